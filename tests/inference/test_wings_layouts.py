"""Wings answers alike on one process and on several, with its caches and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import parrot_sys
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wings_tiny"
PAD = 630
"""The fixture's padding id."""


def _generate(parallel: ParallelConfig, compat: str | None) -> list[list[int]]:
    expected = load_file(FIXTURE / "expected.safetensors")
    model = parrot_sys.load_pretrained(FIXTURE / "model", parallel=parallel, compat=compat)[0]
    image, text = expected["batch2.input_ids"][0, :40], expected["batch4.input_ids"][0, :30]
    ids = torch.nn.utils.rnn.pad_sequence([image, text], batch_first=True, padding_value=PAD)
    answers = model.generate(ids, images=expected["pixel_values"][:1], max_new_tokens=6, eos_token_id=[])
    return answers[:, -6:].tolist()


@pytest.mark.parametrize("compat", ["paper", pytest.param("released", marks=pytest.mark.slow)])
def test_answers_under_layouts(compat: str) -> None:
    (wanted,) = run_distributed(lambda rank, size: _generate(ParallelConfig(), compat), 1)
    for layout in (
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2),
    ):
        assert run_distributed(lambda rank, size, layout=layout: _generate(layout, compat), 2) == [wanted, wanted]
