"""Attention in which each query row sees one contiguous range of key rows, in plain PyTorch.

What the references and CPU back ends of `router_attention` and `segment_attention` share: dense over all rows (any
device, no host synchronisation), or over blocks of query rows and the keys that a block sees (CPU, linear memory).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# T query rows, M key rows, n query heads, g key/value heads, r = n / g, d head width, C extra value columns (may be 0)

Grads = tuple[Tensor, ...]
MaybeGrads = tuple[Tensor | None, ...]
BLOCK_ROWS = 128


def why_not_cpu(*args: object) -> str | None:
    """None when all tensors are on the CPU, where blocks may read the ranges; else the reason."""
    devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
    return None if devices <= {"cpu"} else f"it needs CPU tensors, got {', '.join(sorted(devices))}"


def gradients(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Grads:
    """Contiguous gradients in the dtype of their inputs; an empty tensor for each None."""
    return tuple(
        own.new_empty(0) if grad is None else grad.to(own.dtype).contiguous()
        for grad, own in zip(grads, inputs, strict=True)
    )


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """[T, n, d] -> [g, r * T, d]."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(grouped: Tensor, num_rows: int, num_heads: int) -> Tensor:
    """[g, r * T, d] -> [T, n, d]."""
    return grouped.reshape(num_heads, num_rows, grouped.shape[2]).transpose(0, 1)


def _attention(query: Tensor, key: Tensor, start: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Weights [g, r * T, M] (zero where a key is not seen) of query [g, r * T, d] and key [M, g, d]; lse [g, r * T]."""
    keys = torch.arange(key.shape[0], device=key.device)
    unseen = ((keys < start[:, None]) | (keys >= end[:, None])).repeat(query.shape[1] // max(start.shape[0], 1), 1)
    scores = (query @ key.permute(1, 2, 0) * scale).masked_fill(unseen, float("-inf"))
    # Softmax of a row that sees nothing is 0 / 0: it is set to zero.
    return scores.softmax(dim=2).masked_fill(unseen, 0.0), scores.logsumexp(dim=2)


def attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor, start: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention in the dtype of its arguments.

    Args:
        query: [T, n, d]; key, value: [M, g, d].
        columns: [M, C], value columns that all heads share.
        start, end: [T] integers; row t sees the keys in [start[t], end[t]).
        scale: factor of the scores.

    Returns:
        out [T, n, d], extra [n, T, C] and lse [n, T]; 0, 0 and -inf for rows that see nothing.
    """
    num_rows, num_heads, _ = query.shape
    attention, lse = _attention(_by_group(query, key.shape[1]), key, start, end, scale)
    return (
        _by_row(attention @ value.transpose(0, 1), num_rows, num_heads),
        (attention @ columns).reshape(num_heads, num_rows, columns.shape[1]),
        lse.reshape(num_heads, num_rows),
    )


def attention_bwd(
    grad_out: Tensor,
    grad_extra: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> MaybeGrads:
    """Gradients of query, key, value and columns, None where `needs` is false.

    The other arguments are the gradients of the outputs of `attention_fwd`, and its arguments.
    """
    num_rows, num_heads, _ = query.shape
    groups = key.shape[1]
    query, grad_out = _by_group(query, groups), _by_group(grad_out, groups)
    grad_extra = grad_extra.reshape(groups, query.shape[1], columns.shape[1])
    attention, _ = _attention(query, key, start, end, scale)
    grad_attention = grad_out @ value.permute(1, 2, 0) + grad_extra @ columns.T
    # Summed here, not taken from the outputs: their rounding would not cancel that of the attention.
    delta = (attention * grad_attention).sum(dim=2, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.reshape(groups, query.shape[1], 1)
    grad_scores = attention * (grad_attention - delta) * scale
    needs_query, needs_key, needs_value, needs_columns = needs
    return (
        _by_row(grad_scores @ key.transpose(0, 1), num_rows, num_heads) if needs_query else None,
        (grad_scores.mT @ query).transpose(0, 1) if needs_key else None,
        (attention.mT @ grad_out).transpose(0, 1) if needs_value else None,
        attention.flatten(0, 1).T @ grad_extra.flatten(0, 1) if needs_columns else None,
    )


def _blocks(start: Tensor, end: Tensor, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, and the keys that some row of each block sees. Reads the ranges: for CPU tensors."""
    empty = end <= start
    first, last = start.masked_fill(empty, num_keys), end.masked_fill(empty, 0)
    for begin in range(0, start.shape[0], BLOCK_ROWS):
        rows = slice(begin, min(begin + BLOCK_ROWS, start.shape[0]))
        low, high = int(first[rows].min()), int(last[rows].max())
        yield rows, slice(min(low, high), high)


def blocked_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor, start: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_fwd` on CPU tensors, holding the scores of BLOCK_ROWS query rows at a time."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], query.shape[0])
    extra = query.new_empty(*lse.shape, columns.shape[1])
    for rows, keys in _blocks(start, end, key.shape[0]):
        own = (start[rows] - keys.start, end[rows] - keys.start)
        out[rows], extra[:, rows], lse[:, rows] = attention_fwd(
            query[rows], key[keys], value[keys], columns[keys], *own, scale
        )
    return out, extra, lse


def blocked_attention_bwd(
    grad_out: Tensor,
    grad_extra: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> MaybeGrads:
    """`attention_bwd` on CPU tensors, holding the scores of BLOCK_ROWS query rows at a time."""
    inputs = (query, key, value, columns)
    totals = [torch.zeros_like(own) if needed else None for own, needed in zip(inputs, needs, strict=True)]
    for rows, keys in _blocks(start, end, key.shape[0]):
        grads = attention_bwd(
            grad_out[rows],
            grad_extra[:, rows],
            None if grad_lse is None else grad_lse[:, rows],
            query[rows],
            key[keys],
            value[keys],
            columns[keys],
            start[rows] - keys.start,
            end[rows] - keys.start,
            scale,
            needs,
        )
        for total, grad, where in zip(totals, grads, (rows, keys, keys, keys), strict=True):
            if total is not None and grad is not None:
                total[where] += grad
    return tuple(totals)
