"""Plain PyTorch `linear_cross_entropy` in blocks of vocabulary columns, fp32 inside; any device, no host sync."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# L label rows, H hidden_size, N vocabulary rows held here, B columns of a block

BLOCK_BYTES = 16 * 2**20
MIN_BLOCK = 256


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Column ranges whose float32 logits stay within BLOCK_BYTES."""
    size = max(MIN_BLOCK, BLOCK_BYTES // (4 * max(num_rows, 1)))
    for start in range(0, num_columns, size):
        yield start, min(start + size, num_columns)


def _own_targets(targets: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Column [L, 1] of each target within [first, last), clamped into it, and whether it lies there [L, 1]."""
    column = (targets - first)[:, None]
    return column.clamp(0, last - first - 1), (column >= 0) & (column < last - first)


def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    # A running maximum and sum: adding up the log-sum-exp of blocks would round once for each of them.
    top = hidden.new_full((hidden.shape[0],), float("-inf"))
    total, target_logits = torch.zeros_like(top), torch.zeros_like(top)
    for start, stop in _blocks(hidden.shape[0], weight.shape[0]):
        logits = hidden @ weight[start:stop].to(hidden.dtype).T
        column, own = _own_targets(targets, vocab_start + start, vocab_start + stop)
        target_logits += (logits.gather(1, column) * own)[:, 0]
        new_top = torch.maximum(top, logits.amax(dim=1))
        total = total * (top - new_top).exp() + logits.sub_(new_top[:, None]).exp_().sum(dim=1)
        top = new_top
    return top + total.log(), target_logits


def linear_cross_entropy_bwd(
    grad_lse: Tensor,
    grad_target_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_start: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = hidden.dtype, lse.dtype
    needs_hidden, needs_weight = needs
    hidden = hidden.to(acc)
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    for start, stop in _blocks(hidden.shape[0], weight.shape[0]):
        block = weight[start:stop].to(acc)
        grad = (hidden @ block.T).sub_(lse[:, None]).exp_().mul_(grad_lse[:, None])
        column, own = _own_targets(targets, vocab_start + start, vocab_start + stop)
        grad.scatter_add_(1, column, grad_target_logits[:, None] * own)
        if needs_hidden:
            grad_hidden.addmm_(grad, block)
        if needs_weight:
            grad_weight[start:stop] = grad.T @ hidden
    return grad_hidden.to(dtype), grad_weight
