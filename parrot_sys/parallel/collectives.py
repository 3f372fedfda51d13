"""Collectives with autograd. Process groups come in as arguments; None means one process, and nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 warns of the old names, 2.11 does not know the new ones.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _owned(tensor: Tensor) -> Tensor:
    """A copy to be reduced in place: contiguous, which NCCL asks for."""
    return tensor.clone(memory_format=torch.contiguous_format)


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        total = _owned(tensor)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = _owned(grad)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return _gathered(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scattered_sum(grad, ctx.counts, ctx.group), None, None


def _gathered(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """All ranks' rows, one after the other; rank r has `counts[r]`."""
    if not (longest := max(counts)):
        return rows.new_empty(rows.shape)
    everyone = rows.new_empty((len(counts) * longest, *rows.shape[1:]))
    # gloo takes equal parts only, and so does the fast path of NCCL: padded to the longest.
    all_gather_single(everyone, _padded(rows, longest), group=group)
    if min(counts) == longest:
        return everyone
    return torch.cat([part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)])


def _scattered_sum(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """The reverse of `_gathered`: the sum over the ranks of the part of `rows` that belongs to this one."""
    longest, own = max(counts), counts[group.rank()]
    if not longest:
        return rows.new_empty(rows.shape)
    total = rows.new_empty((longest, *rows.shape[1:]))
    if min(counts) < longest:
        rows = torch.cat([_padded(part, longest) for part in rows.split(list(counts))])
    reduce_scatter_single(total, rows.contiguous(), group=group)
    return total[:own]


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros((length, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded


def _exchanged(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _SplitToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.counts = group, split_counts(len(rows), group.size())
        return rows.split(ctx.counts)[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.counts, ctx.group), None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.group, ctx.counts = group, list(counts)
        return _gathered(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.counts)[ctx.group.rank()].contiguous(), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.group, ctx.counts = group, counts
        return _scattered_sum(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.counts, ctx.group), None, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchanged(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def reduce_from_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of `group`; the gradient passes unchanged.

    For partial results that every rank uses alike from here on: each rank's gradient is then already the whole one.
    """
    return tensor if group is None else _ReduceFromGroup.apply(tensor, group)


def copy_to_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The same tensor; its gradient is summed over the ranks of `group`.

    For a tensor that all ranks hold alike and each uses in a part of its own.
    """
    return tensor if group is None else _CopyToGroup.apply(tensor, group)


def split_counts(num_rows: int, parts: int) -> list[int]:
    """Number of rows that each of `parts` ranks gets of `num_rows`: as equal as can be, the first ones more."""
    return [num_rows // parts + (part < num_rows % parts) for part in range(parts)]


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Rows of all ranks, of which rank r has `counts[r]`; every rank uses them in its own way.

    The gradients of a rank's rows are summed over the ranks.
    """
    return rows if group is None else _AllGatherRows.apply(rows, counts, group)


def gather_counts(count: int, group: ProcessGroup | None, device: torch.device) -> list[int]:
    """The `count` of every rank, for `all_gather_rows`."""
    if group is None:
        return [count]
    own = torch.tensor([count], dtype=torch.int64, device=device)
    counts = own.new_empty(group.size())
    all_gather_single(counts, own, group=group)
    return list(map(int, counts.tolist()))


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the ranks of `group`, without a gradient."""
    result = _owned(tensor.detach())
    if group is not None:
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def split_to_group(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part (`split_counts`) of rows that all ranks of `group` hold alike; its gradients are gathered."""
    return rows if group is None else _SplitToGroup.apply(rows, group)


def gather_from_group(rows: Tensor, num_rows: int, group: ProcessGroup | None) -> Tensor:
    """The reverse of `split_to_group`: [num_rows, ...] on every rank, which all use alike from here on.

    Each rank's gradient is then already the whole one, and the part of its own rows is taken.
    """
    if group is None:
        return rows
    return _GatherFromGroup.apply(rows, split_counts(num_rows, group.size()), group)


def reduce_scatter_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks; rank r gets `counts[r]` rows of it. The reverse of `all_gather_rows`."""
    return rows if group is None else _ReduceScatterRows.apply(rows, counts, group)


def all_to_all_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Rows for other ranks to these and theirs back, both in the order of the ranks.

    Args:
        rows: `send[r]` rows for rank r.
        send: one count a rank.
        receive: how many rows each rank has for this one.
        group: None for one process, which keeps its rows.
    """
    return rows if group is None else _AllToAllRows.apply(rows, send, receive, group)
