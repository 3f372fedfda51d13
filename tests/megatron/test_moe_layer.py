"""Router and experts inside Megatron's MoELayer, against TopKRouter and SequentialMLP on the same layout and on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parrot_sys.megatron.initialize import ParallelConfig, initialize, shutdown
from parrot_sys.testing.distributed import run_distributed
from tests.megatron import gpt_training as gpt

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
DEEPSEEK = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_shared_expert_intermediate_size": 8,
}
PRE_SOFTMAX = {
    "moe_router_pre_softmax": True,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.05],
    "moe_router_topk": 3,
    "moe_router_dtype": "fp64",
}
SETTINGS = {"aux": AUX, "deepseek": DEEPSEEK, "pre-softmax": PRE_SOFTMAX}
LAYOUTS = {
    "ep2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "tp2-etp2": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp2-ep2": (
        2,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=1,
        ),
    ),
    "ep4": (4, ParallelConfig(expert_model_parallel_size=4)),
    "ep2-dp2": (4, ParallelConfig(expert_model_parallel_size=2)),
    "tp2-ep2-etp2": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
        ),
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each setting, a checkpoint of Megatron's own model with random weights, written by one process."""
    folders = {}
    initialize()
    for name, moe in SETTINGS.items():
        torch.manual_seed(5)
        folders[name] = tmp_path_factory.mktemp(name)
        gpt.save(gpt.build(gpt.make_config(ParallelConfig(), **moe), ours=False), folders[name])
    shutdown()
    return folders


@pytest.fixture(scope="module")
def one_process(start: dict[str, Path]) -> dict[str, gpt.Run]:
    """Megatron's own model on one process."""
    runs = {}
    for name, moe in SETTINGS.items():
        (peer, ours), *_ = run_distributed(gpt.on_ranks, 1, ParallelConfig(), start[name], _with_dispatcher(moe))
        _assert_same(peer, [peer], [ours], 1e-6)
        runs[name] = peer
    return runs


def _with_dispatcher(moe: dict[str, Any], kind: str = "allgather") -> dict[str, Any]:
    return {**moe, "moe_token_dispatcher_type": kind}


def _assert_same(reference: gpt.Run, wanted: list[gpt.Run], got: list[gpt.Run], tolerance: float) -> None:
    """Losses of three steps, all gradients, and on one layout choices and expert bias."""
    for run in got:
        np.testing.assert_allclose(run.losses, reference.losses, rtol=tolerance)
    theirs, ours = gpt.assemble(wanted), gpt.assemble(got)
    assert theirs.keys() == ours.keys()
    floor = 1e-3 * max(abs(gradient).max() for gradient in theirs.values())
    for key, gradient in theirs.items():
        assert abs(ours[key] - gradient).max() <= tolerance * max(abs(gradient).max(), floor), key
    for a, b in zip(wanted, got, strict=len(wanted) == len(got)):
        if len(wanted) == len(got):
            assert np.array_equal(a.chosen, b.chosen)
        if a.expert_bias is not None:
            assert np.array_equal(a.expert_bias, b.expert_bias)
            assert abs(a.expert_bias).max() > 0


@pytest.mark.parametrize(
    ("layout", "setting", "dispatcher"),
    [
        ("ep2", "aux", "allgather"),
        ("ep2", "deepseek", "alltoall"),
        ("tp2-etp2", "deepseek", "alltoall"),
        ("tp2-ep2", "pre-softmax", "allgather"),
        ("tp2-ep2", "deepseek", "alltoall"),
        ("ep4", "pre-softmax", "alltoall"),
        ("ep2-dp2", "deepseek", "allgather"),
        ("tp2-ep2-etp2", "aux", "alltoall"),
        ("tp2-ep2-etp2", "deepseek", "allgather"),
    ],
)
def test_layouts_equal_megatrons_experts_and_one_process(
    layout: str, setting: str, dispatcher: str, start: dict[str, Path], one_process: dict[str, gpt.Run]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    moe = _with_dispatcher(SETTINGS[setting], dispatcher)
    pairs = run_distributed(gpt.on_ranks, world_size, parallel, start[setting], moe, timeout=120)
    peers, ours = [peer for peer, _ in pairs], [own for _, own in pairs]
    _assert_same(peers[0], peers, ours, 2e-6)
    _assert_same(one_process[setting], [one_process[setting]], ours, 1e-5)
