"""Plain PyTorch `permute` and `unpermute`, fp32 inside; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# T rows, K topk, R places in the plan, W columns

Needs = tuple[bool, bool]


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_position(rows: Tensor, plan: Tensor, positions: int) -> Tensor:
    """[R, ...] -> [T * K, ...], zeros at dropped positions."""
    return rows.new_zeros(positions, *rows.shape[1:]).index_copy(0, plan, rows)


def permute_fwd(x: Tensor, probs: Tensor | None, plan: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    row_probs = x.new_empty(0, dtype=_acc(x)) if probs is None else probs.flatten()[plan]
    return x[plan // topk], row_probs


def permute_bwd(
    grad_rows: Tensor | None, grad_row_probs: Tensor | None, plan: Tensor, topk: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    grad_x, grad_probs = (plan.new_empty(0, dtype=torch.float32) for _ in range(2))
    if grad_rows is not None:
        grad_x = unpermute_fwd(grad_rows, None, plan, topk, num_rows)
    if grad_row_probs is not None:
        grad_probs = _by_position(grad_row_probs, plan, num_rows * topk).view(num_rows, topk)
    return grad_x, grad_probs


def unpermute_fwd(rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, num_rows: int) -> Tensor:
    """See the contract in the package docstring."""
    chosen = _by_position(rows.to(_acc(rows)), plan, num_rows * topk).view(num_rows, topk, rows.shape[1])
    if probs is not None:
        chosen = chosen * probs[..., None]
    total = chosen[:, 0]
    for k in range(1, topk):
        total = total + chosen[:, k]
    return total.to(rows.dtype)


def unpermute_bwd(
    grad: Tensor, rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, needs: Needs
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    acc = _acc(rows)
    grad_rows, grad_probs = rows.new_empty(0), rows.new_empty(0, dtype=acc)
    own = grad.to(acc)[plan // topk]
    if needs[0]:
        grad_rows = (own if probs is None else own * probs.flatten()[plan, None]).to(rows.dtype)
    if needs[1] and probs is not None:
        grad_probs = _by_position((own * rows.to(acc)).sum(1), plan, probs.numel()).view_as(probs)
    return grad_rows, grad_probs
