"""Experts on Megatron's groups: who must take part without gradients, and what Megatron is told of the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_model
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.parrot_reference import CONFIG, MIXED, make_batch

MOE = TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=20, routing="topk", topk=2)
TEXT = make_batch((MIXED[1],))
IMAGES = make_batch((MIXED[0], MIXED[2]))


def _losses(rank: int, parallel: ParallelConfig) -> np.ndarray:
    """Validation losses of a micro-batch with images, or on the last rank of one without."""
    initialize(parallel)
    torch.manual_seed(5)
    model = build_model(dataclasses.replace(CONFIG, moe=MOE), parallel, with_vision_tower=False).eval()
    with torch.no_grad():
        return model(TEXT if rank == 1 else IMAGES).losses.numpy()


@pytest.mark.parametrize("sizes", [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 2}])
def test_validation_on_a_rank_without_images(sizes: dict[str, Any]) -> None:
    shutdown()
    results = run_distributed(lambda rank, size: _losses(rank, ParallelConfig(**sizes)), 2)
    for rank, losses in enumerate(results):
        (wanted,) = run_distributed(lambda _, size, rank=rank: _losses(rank, ParallelConfig()), 1)
        np.testing.assert_allclose(losses, wanted, rtol=1e-5, equal_nan=False)


def _marks(rank: int, parallel: ParallelConfig) -> dict[str, tuple[bool, int | None]]:
    initialize(parallel)
    model = build_model(dataclasses.replace(CONFIG, moe=MOE), parallel, device="meta", with_vision_tower=False)
    return {
        name: (getattr(p, "allreduce", True), p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for name, p in model.named_parameters()
        if name.startswith(("moe.", "projector."))
    }


@pytest.mark.parametrize(
    ("ranks", "sizes", "experts", "projector"),
    [
        pytest.param(1, {}, (True, None), False, id="one"),
        pytest.param(2, {"expert_model_parallel_size": 2}, (False, 2), False, id="ep2"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, (True, 2), True, id="tp2-etp2"),
        pytest.param(
            2, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, (False, 2), True, id="tp2-etp1"
        ),
    ],
)
def test_marks(ranks: int, sizes: dict[str, int], experts: tuple[bool, int | None], projector: bool) -> None:
    """Experts have a reduction of their own where other ranks hold their copies than those of dense parameters."""
    shutdown()
    for marks in run_distributed(lambda rank, size: _marks(rank, ParallelConfig(**sizes)), ranks):
        assert marks["moe.router_weight"] == (True, None)
        assert marks["moe.w_gate_up"] == experts
        assert marks["moe.w_down"] == (experts[0], experts[1] and 1)
        cut = {"0.weight": 0, "0.bias": 0, "2.weight": 1} if projector else {}
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert marks[f"projector.{name}"] == (True, cut.get(name))
