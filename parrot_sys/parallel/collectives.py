"""Collectives with autograd. Process groups come in as arguments; None means one process, and nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        total = tensor.clone()
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
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        whole = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        part = grads[0].new_empty(grads[0].shape[0] // ctx.group.size(), *grads[0].shape[1:])
        dist.reduce_scatter_tensor(part, grads[0].contiguous(), group=ctx.group)
        return part, None


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


def gather_from_group(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensors of all ranks of `group`, one behind the other along dim 0; they must have the same shape.

    For parts that each rank then uses in its own way: the gradient of a part is the sum of what all ranks give for it.
    """
    return tensor if group is None else _GatherFromGroup.apply(tensor, group)


@torch.no_grad()
def all_reduce_max(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the ranks of `group`, without a gradient."""
    result = tensor.detach().clone()
    if group is not None:
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result
