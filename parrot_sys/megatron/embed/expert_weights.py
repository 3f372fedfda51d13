"""Weights of `GroupedExperts`: allocation, initial values, and their place in Megatron's distributed checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys import platform

# N experts of this rank, H hidden_size, I inner width of an expert, a part of it on each expert tensor parallel rank

_Groups = tuple[ProcessGroup, ProcessGroup, ProcessGroup]


def allocate(
    config: TransformerConfig, num_experts: int, ffn_size: int, hidden_size: int, tensor_parallel: int
) -> tuple[nn.Parameter, nn.Parameter]:
    """Uninitialised `w_gate_up` [N, 2, I, H] and `w_down` [N, H, I], where Megatron would allocate them."""
    device = None if config.use_cpu_initialization else platform.device()
    part = ffn_size // tensor_parallel
    gate_up = torch.empty(num_experts, 2, part, hidden_size, dtype=config.params_dtype, device=device)
    down = torch.empty(num_experts, hidden_size, part, dtype=config.params_dtype, device=device)
    return nn.Parameter(gate_up), nn.Parameter(down)


@torch.no_grad()
def initialize(
    config: TransformerConfig, w_gate_up: Tensor, w_down: Tensor, ep_group: ProcessGroup, tp_group: ProcessGroup
) -> None:
    """Draws the initial weights with `init_method` and `output_layer_init_method`.

    On the host (`use_cpu_initialization`) each expert has a seed of its own, taken from torch's generator, so that its
    weights are the same on every layout. On the device Megatron's expert generator is used as by its own experts.
    """
    if not config.use_cpu_initialization:
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for gate_up, down in zip(w_gate_up, w_down, strict=True):
                config.init_method(gate_up.flatten(0, 1))
                config.output_layer_init_method(down)
        return
    if w_gate_up.is_meta:
        return
    seed = int(torch.randint(2**62, ()))
    first = ep_group.rank() * len(w_gate_up)
    rank, size = tp_group.rank(), tp_group.size()
    _, _, part, hidden_size = w_gate_up.shape
    with torch.random.fork_rng(devices=[]):
        for index, (gate_up, down) in enumerate(zip(w_gate_up, w_down, strict=True)):
            torch.manual_seed(seed + first + index)
            whole = torch.empty(2, part * size, hidden_size)
            config.init_method(whole.flatten(0, 1))
            gate_up.copy_(whole.chunk(size, dim=1)[rank])
            whole = torch.empty(hidden_size, part * size)
            config.output_layer_init_method(whole)
            down.copy_(whole.chunk(size, dim=1)[rank])


def sharded(
    w_gate_up: Tensor,
    w_down: Tensor,
    groups: _Groups,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """State dict of `GroupedExperts` as `SequentialMLP` stores it: [E, 2 * I, H] and [E, H, I] over all ranks.

    Args:
        w_gate_up: parameter.
        w_down: parameter.
        groups: expert parallel, expert tensor parallel, expert data parallel.
        prefix: of the module.
        sharded_offsets: of the layers around it, as Megatron hands them down.
        metadata: with `singleton_local_shards`, each expert has keys of its own.
    """
    ep_group, tp_group, dp_group = groups
    apart = bool((metadata or {}).get("singleton_local_shards", False))
    build = partial(_build, groups=groups, prefix=prefix, offsets=sharded_offsets, apart=apart)
    replica = (0, 0, dp_group.rank())
    keys = {"w_gate_up": f"{prefix}experts.linear_fc1.weight", "w_down": f"{prefix}experts.linear_fc2.weight"}
    state: dict[str, Any] = {
        f"{prefix}{name}": ShardedTensorFactory(
            keys[name], weight, partial(build, gated=gated), partial(_merge, apart=apart, gated=gated), replica
        )
        for name, weight, gated in (("w_gate_up", w_gate_up, True), ("w_down", w_down, False))
    }
    # SequentialMLP asks for the extra state of its linear layers, which is empty.
    first, total = ep_group.rank() * len(w_gate_up), ep_group.size() * len(w_gate_up)
    for expert in range(first, first + len(w_gate_up)):
        offsets = sharded_offsets if apart else (*sharded_offsets, (len(sharded_offsets), expert, total))
        for layer in ("linear_fc1", "linear_fc2"):
            name = f"{layer}._extra_state"
            key = f"{prefix}experts.{expert}.{name}" if apart else f"{prefix}experts.{name}"
            replica = (0, tp_group.rank(), dp_group.rank())
            state[f"{prefix}expert{expert}.{name}"] = make_sharded_object_for_checkpoint(None, key, offsets, replica)
    return state


@torch.no_grad()
def _build(
    key: str,
    weight: Tensor,
    replica_id: Any,
    _: Any = None,
    *,
    groups: _Groups,
    prefix: str,
    offsets: tuple[Any, ...],
    apart: bool,
    gated: bool,
) -> list[Any]:
    """Pieces of `weight` (or of its optimizer state) in the checkpoint; `_merge` puts them together again."""
    ep_group, tp_group, _dp_group = groups
    rank, size, axis = tp_group.rank(), tp_group.size(), len(offsets)
    # Gate and up are two halves of the rows of linear_fc1; linear_fc2 is cut along its columns.
    parts = [weight[:, 0], weight[:, 1]] if gated else [weight]
    inner = 0 if gated else 1
    pieces: list[Any] = []
    for half, part in enumerate(parts):
        cut = (half * size + rank, len(parts) * size)
        if not apart:
            place = ((axis, ep_group.rank(), ep_group.size()), (axis + 1 + inner, *cut))
            pieces.append(_sharded_tensor(key, part, offsets, place, replica_id))
            continue
        for expert, tensor in enumerate(part, ep_group.rank() * len(part)):
            own = key.replace(f"{prefix}experts.", f"{prefix}experts.{expert}.") + ("_w", "_v")[half] * gated
            pieces.append(_sharded_tensor(own, tensor, offsets, ((axis + inner, rank, size),), replica_id))
    return pieces


def _sharded_tensor(
    key: str, tensor: Tensor, offsets: tuple[Any, ...], place: tuple[Any, ...], replica_id: Any
) -> ShardedTensor:
    axes = len(offsets)
    return ShardedTensor.from_rank_offsets(
        key, tensor.contiguous(), *offsets, *place, replica_id=replica_id, prepend_axis_num=axes
    )


@torch.no_grad()
def _merge(pieces: list[Tensor], *, apart: bool, gated: bool) -> Tensor:
    if not apart:
        return torch.stack(pieces, dim=1) if gated else pieces[0]
    experts = torch.stack(pieces)
    return experts.unflatten(0, (2, -1)).transpose(0, 1).contiguous() if gated else experts
