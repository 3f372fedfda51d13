"""The Adam fallback: against torch's AdamW and Adam, and through a checkpoint of Megatron's distributed optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import nn

from parrot_sys.megatron.runtime.adam import Adam, install_adam
from parrot_sys.megatron.runtime.initialize import initialize
from parrot_sys.systems.build import build_model
from parrot_sys.testing.distributed import run_distributed
from tests.megatron.parrot_reference import CONFIG, MIXED, make_batch


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_torch(adam_w_mode: bool, weight_decay: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(7, 3), torch.randn(5), torch.randn(2)]
    ours, theirs = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    options = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = Adam(ours, adam_w_mode=adam_w_mode, **options)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options)
    for step in range(5):
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third never gets a gradient
            a.grad = torch.randn_like(a) * (step + 1)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["step"] == 5
    assert torch.equal(ours[2], start[2])


def test_moments_are_float32_for_bfloat16_parameters() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="closure"):
        Adam([parameter]).step(lambda: 0.0)
    parameter = nn.Parameter(torch.ones(4))
    optimizer = Adam([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert {state.dtype for state in optimizer.state[parameter].values()} == {torch.float32}


def _train(folder: str, dtype: torch.dtype, action: str) -> list[float]:
    """Losses of steps on one rank: `plain` takes four, `save` two and a checkpoint, `load` the two after it."""
    initialize()
    assert install_adam()
    torch.manual_seed(3 if action != "load" else 4)
    model = build_model(CONFIG, dtype=dtype, with_vision_tower=False)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.01,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=1.0,
    )
    optimizer = get_megatron_optimizer(config, [ddp])

    def state(loading: bool) -> dict:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"distrib_optim_sharding_type": "dp_reshardable", "dp_cp_group": group}
        weights = model.sharded_state_dict(metadata=metadata)
        return {
            "model": weights,
            "optimizer": optimizer.sharded_state_dict({"model": weights}, is_loading=loading, metadata=metadata),
        }

    if action == "load":
        loaded = dist_checkpointing.load(state(True), folder)
        model.load_state_dict(loaded["model"])
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    batch, losses = make_batch(MIXED), []
    for _ in range(4 if action == "plain" else 2):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(batch).losses.mean()
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
        losses.append(loss.item())
    if action == "save":
        dist_checkpointing.save(state(False), folder)
    parallel_state.destroy_model_parallel()
    return losses


def _rank(rank: int, size: int, folder: str, dtype: torch.dtype, action: str) -> list[float]:
    return _train(folder, dtype, action)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_distributed_optimizer_resumes_bit_for_bit(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    plain, before, after = (
        run_distributed(_rank, ranks, str(tmp_path), dtype, action)[0] for action in ("plain", "save", "load")
    )
    assert plain == before + after
    assert plain[-1] < plain[0]
