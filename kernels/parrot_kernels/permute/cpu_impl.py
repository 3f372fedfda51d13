"""CPU `permute` and `unpermute`: torch's row copy on the way there, C++ loops for the weighted sums on the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension

# T rows, K topk, R places in the plan, W columns

Needs = tuple[bool, bool]


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    return _extension.why_not_loops(args)


def permute_fwd(x: Tensor, probs: Tensor | None, plan: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    row_probs = x.new_empty(0, dtype=torch.float32) if probs is None else probs.flatten().index_select(0, plan)
    return x.index_select(0, plan // topk), row_probs


def permute_bwd(
    grad_rows: Tensor | None, grad_row_probs: Tensor | None, plan: Tensor, topk: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    none = torch.empty(0)
    grad_x = none if grad_rows is None else unpermute_fwd(grad_rows, None, plan, topk, num_rows)
    if grad_row_probs is None:
        return grad_x, none.clone()
    return grad_x, grad_row_probs.new_zeros(num_rows * topk).index_copy_(0, plan, grad_row_probs).view(num_rows, topk)


def unpermute_fwd(rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, num_rows: int) -> Tensor:
    """See the contract in the package docstring."""
    y = rows.new_empty(num_rows, rows.shape[1])
    torch.ops.parrot_ext.unpermute_fwd(rows, probs, plan, topk, y)
    return y


def unpermute_bwd(
    grad: Tensor, rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, needs: Needs
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    grad_rows, grad_probs = torch.empty_like(rows), rows.new_empty(len(grad), topk, dtype=torch.float32)
    torch.ops.parrot_ext.unpermute_bwd(grad, rows, probs, plan, topk, grad_rows, grad_probs)
    return (
        grad_rows if needs[0] else rows.new_empty(0),
        grad_probs if needs[1] and probs is not None else grad_probs.new_empty(0),
    )
