"""Even shares of a checkpoint for data-parallel ranks, which hold the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed import ProcessGroup

from parrot_sys import platform

_PIECES = 20
"""Pieces of a share, at least: ranks then differ by 5 % at most, since each piece goes to the rank with the least."""
_SMALLEST = 1 << 20  # bytes; smaller pieces would only make the index long


def cut_for_shares(state: dict[str, Any], group: ProcessGroup) -> None:
    """Cuts large tensors into pieces, in place; a collective of all ranks.

    Without it the rank that writes the embedding writes more than all others. A checkpoint that is cut in another way
    loads in the same way.

    Args:
        state: sharded state dict that is to be saved.
        group: ranks that share the writing of what they hold in common.
    """
    apply_factories(state)
    if group.size() == 1:
        return
    held = sum(tensor.data.nbytes for tensor in _tensors(state))
    # Pipeline stages may hold parts of one tensor, which must be cut alike.
    limit = torch.tensor(held // (_PIECES * group.size()), dtype=torch.int64, device=platform.device())
    dist.all_reduce(limit, op=dist.ReduceOp.MIN)
    size = max(int(limit.item()), _SMALLEST)
    dict_list_map_inplace(lambda part: _cut(part, size) if isinstance(part, ShardedTensor) else part, state)


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _cut(tensor: ShardedTensor, size: int) -> ShardedTensor | list[ShardedTensor]:
    """Pieces of about `size` bytes, cut along the first dimension."""
    wanted = -(-tensor.data.nbytes // size)
    if wanted < 2 or tensor.axis_fragmentations is None:
        return tensor
    rows = tensor.local_shape[0]
    # The grid of pieces has to be regular.
    count = next((n for n in range(wanted, min(rows, 4 * wanted) + 1) if rows % n == 0), 1)
    if count == 1:
        return tensor
    axis, step = tensor.prepend_axis_num, rows // count
    fragments = [n * count if i == axis else n for i, n in enumerate(tensor.axis_fragmentations)]
    pieces = []
    for index, data in enumerate(tensor.data.split(step)):
        offset = [at + index * step if i == axis else at for i, at in enumerate(tensor.global_offset)]
        pieces.append(
            replace(
                tensor,
                data=data,
                local_shape=tuple(data.shape),
                global_offset=tuple(offset),
                axis_fragmentations=tuple(fragments),
            )
        )
    return pieces
