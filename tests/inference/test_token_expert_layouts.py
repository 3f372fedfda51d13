"""A token-routed decoder answers alike on one process and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parrot_sys.engine.lockstep import inference_layout
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.systems.build import build_model
from parrot_sys.systems.load import load_released
from parrot_sys.testing.distributed import run_distributed
from tests.training.layouts import QWEN3, checkpoint, layout, replace

CONFIG = replace(
    QWEN3,
    llm=replace(QWEN3.llm, family="qwen3_moe", experts=TokenExpertsConfig(num_experts=8, topk=3, ffn_hidden_size=20)),
)
LAYOUTS = {
    "tp2-ep2-etp1": (2, layout(tensor=2, experts=2, expert_tensor=1)),
    "tp2-ep2-etp2": (4, layout(tensor=2, experts=2)),
    "pp2-ep2": (4, layout(pipeline=2, experts=2)),
}


def _answers(path: Path, parallel: ParallelConfig) -> list[list[int]]:
    parallel = inference_layout(parallel)
    initialize(parallel)
    model = build_model(CONFIG, parallel)
    load_released(model, path)
    ids = torch.tensor([[0, 0, 0, 5, 9, 33, 2], [4, -200, 7, 8, 21, 3, 60]])
    side = CONFIG.vision.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
    ours = ParrotForConditionalGeneration(model)
    tokens: torch.Tensor = ours.generate(ids, (ids != 0).long(), pixels, max_new_tokens=8, eos_token_id=[])
    return tokens[:, -8:].tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_tokens_are_those_of_one_process(name: str) -> None:
    ranks, parallel = LAYOUTS[name]
    with checkpoint(CONFIG) as path:
        (wanted,) = run_distributed(lambda rank, size: _answers(path, ParallelConfig()), 1)
        assert len({tuple(row) for row in wanted}) == 2
        assert run_distributed(lambda rank, size: _answers(path, parallel), ranks) == [wanted] * ranks
