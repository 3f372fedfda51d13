"""A MultiModal-GPT that several processes serve answers like one that one process serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parrot_sys
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.testing.distributed import run_distributed
from tests.models.flamingo_reference import ReleasedMultimodalGpt, Shape

SHAPE = Shape(rank=2, vision_heads=4, heads=4, kv_heads=2, vocab=62, layers=4)
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def _answers(directory: Path, parallel: ParallelConfig | None, compat: Any) -> list[torch.Tensor]:
    model, _ = parrot_sys.load_pretrained(directory, parallel=parallel, compat=compat)
    results: list[torch.Tensor] = []

    def program() -> int:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, SHAPE.vocab - 1, (3, 9), generator=generator)
        ids[0, 2] = ids[1, 1] = ids[1, 5] = SHAPE.vocab - 1
        pixels = torch.randn(3, 3, SHAPE.image_size, SHAPE.image_size, generator=generator)
        mask = torch.ones_like(ids)
        # Ends at different lengths, so that requests leave the cache one by one.
        ends = list(range(0, SHAPE.vocab, 5))
        results.append(model.generate(ids, mask, pixels, max_new_tokens=8, eos_token_id=ends, pad_token_id=0))
        results.append(model(ids, mask, pixels).logits)
        return 0

    with torch.no_grad():
        model.lockstep.run(program)
    return results


@pytest.mark.parametrize(
    ("layout", "compat"),
    [
        ("tp2", "released"),
        ("pp2", "paper"),
        pytest.param("tp2-pp2", "released", marks=pytest.mark.slow),
        pytest.param("tp2-pp2", "paper", marks=pytest.mark.slow),
    ],
)
def test_same_answers(layout: str, compat: Any, tmp_path: Path) -> None:
    def write(rank: int, size: int) -> list[torch.Tensor]:
        torch.manual_seed(4)
        parts = ReleasedMultimodalGpt(SHAPE).write(tmp_path)
        convert(ConvertConfig(source_format="multimodal_gpt", output=tmp_path / "model", **parts))
        return _answers(tmp_path / "model", None, compat)

    (wanted,) = run_distributed(write, 1)
    parallel = ParallelConfig(**LAYOUTS[layout])
    results = run_distributed(
        lambda rank, size: _answers(tmp_path / "model", parallel, compat), parallel.model_parallel_size
    )
    tokens, logits = results[0]
    assert torch.equal(tokens, wanted[0])
    torch.testing.assert_close(logits, wanted[1], rtol=1e-4, atol=1e-5)
