"""Optimizer state between layouts that split experts and such that do not, on a Megatron GPT with MoE layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it: once here instead of a second in each forked rank
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint import store as checkpointing
from parrot_sys.megatron.checkpoint.optimizer_state import groups_of, with_saved_step
from parrot_sys.megatron.runtime.adam import install_adam
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from parrot_sys.testing.distributed import run_distributed

SEQUENCES, LENGTH, VOCABULARY, EXPERTS = 4, 8, 32, 4


def _build(expert_parallel: int, distributed: bool) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    initialize(ParallelConfig(expert_model_parallel_size=expert_parallel), seed=5)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=24,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=expert_parallel,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    model = GPTModel(config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    wrapped = DistributedDataParallel(config, settings, model)
    install_adam()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            use_distributed_optimizer=distributed,
            params_dtype=torch.float32,
        ),
        [wrapped],
    )
    return wrapped, optimizer


def _step(model: DistributedDataParallel, optimizer: MegatronOptimizer, step: int) -> float:
    rank, size = dist.get_rank(), dist.get_world_size()
    share = SEQUENCES // size
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    tokens = tokens[rank * share : (rank + 1) * share]
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    model.zero_grad_buffer()
    positions = torch.arange(LENGTH).expand(share, -1)
    loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).float().mean()
    loss.backward()
    finalize_model_grads([model], None)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / size


def _save_and_go_on(rank: int, size: int, folder: Path, expert_parallel: int, distributed: bool) -> list[float]:
    model, optimizer = _build(expert_parallel, distributed)
    for step in range(2):
        _step(model, optimizer, step)
    checkpointing.save_distributed(folder, [model.module], optimizer, {"world_size": size})
    return [_step(model, optimizer, step) for step in range(2, 5)]


def _load_and_go_on(rank: int, size: int, folder: Path, expert_parallel: int, distributed: bool) -> list[float]:
    model, optimizer = _build(expert_parallel, distributed)
    checkpointing.load_training_state(folder, [model.module], optimizer)
    assert {group["step"] for group in optimizer.param_groups} == {2}
    return [_step(model, optimizer, step) for step in range(2, 5)]


@pytest.fixture
def _as_other_programs_save(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prefixes `chained_0.` and `chained_1.` in the keys of the optimizer, which Megatron writes by default."""
    ours = checkpointing._metadata
    monkeypatch.setattr(checkpointing, "_metadata", lambda: ours() | {"chained_optim_avoid_prefix": False})
    yield
    monkeypatch.undo()


LAYOUTS = [
    pytest.param((2, 2), (2, 1), id="ep2-dp2"),
    pytest.param((2, 1), (2, 2), id="dp2-ep2"),
    pytest.param((2, 2), (1, 1), id="ep2-one"),
    pytest.param((1, 1), (4, 2), id="one-ep2dp2"),
]


def _check(before: tuple[int, int], after: tuple[int, int], distributed: bool, folder: Path) -> None:
    """Layouts are (ranks, expert parallel size)."""
    folder.mkdir()
    wanted = run_distributed(_save_and_go_on, before[0], folder, before[1], distributed)[0]
    got = run_distributed(_load_and_go_on, after[0], folder, after[1], distributed)[0]
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("before", "after"), LAYOUTS)
def test_experts_split_and_whole(
    before: tuple[int, int], after: tuple[int, int], distributed: bool, tmp_path: Path
) -> None:
    _check(before, after, distributed, tmp_path / "checkpoint")


@pytest.mark.usefixtures("_as_other_programs_save")
def test_prefixes_of_other_programs_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    _check((2, 2), (1, 1), False, folder)
    keys = checkpointing.tensors_of(folder)
    assert any(key.startswith("chained_1.") for key in keys), "the checkpoint has the prefixes"


def test_settings_are_the_optimizers_own_and_the_step_is_the_checkpoints() -> None:
    dense: dict[str, Any] = {"wd_mult": 1.0, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": False}
    saved = groups_of({0: {"param_groups": [dense | {"step": 3, "eps": 1e-3}]}, 1: [{"param_groups": []}]})
    template = {"param_groups": [dense | {"eps": 1.0, "params": [7]}, dense | {"wd_mult": 0.0, "eps": 1.0}]}
    assert with_saved_step(template, None, saved)["param_groups"] == [
        group | {"step": 3} for group in template["param_groups"]
    ]
    with pytest.raises(CheckpointError, match="must have parameter groups at one step"):
        with_saved_step(template, None, [dense | {"step": 1}, dense | {"step": 2}])
