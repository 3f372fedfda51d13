"""`segment_attention`: cross-attention in which each row sees one contiguous segment of key rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator


@operator("segment_attention")
def _fwd(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    args = (query, key, value, kv_start, kv_end, scale)
    return registry.select("segment_attention", *args).segment_attention_fwd(*args)


@_fwd.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(num_heads, num_rows, dtype=accumulate_dtype(query.dtype))


@operator("segment_attention_bwd")
def _bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    args = (query, key, value, kv_start, kv_end)
    impl = registry.select("segment_attention", *args, scale)
    return impl.segment_attention_bwd(grad_out, grad_lse, *args, out, lse, scale, tuple(needs))


@_bwd.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return like_or_empty(query, needs[0]), like_or_empty(key, needs[1]), like_or_empty(value, needs[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _bwd(grad_out, grad_lse, *tensors, out, lse, ctx.scale, needs)
    return *map(or_none, grads, needs), None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query row over its own contiguous segment of key rows; no dense mask, linear memory.

    Text rows to the tokens of one image each (Flamingo, arXiv 2204.14198), to the memory of their sample (LoRRA), or to
    the part of a memory that is not after them. All samples of a pack are one call.

    Args:
        query: [T, n, d].
        key: [M, g, d], dtype of `query`; query head h reads head h // (n / g).
        value: [M, g, d], dtype of `query`.
        kv_start: [T] int32, first key row that each query row sees.
        kv_end: [T] int32, one past the last; a row with kv_end <= kv_start gets zeros.
        scale: positive factor of the scores, usually 1 / sqrt(d).

    Returns:
        out [T, n, d] and lse [n, T] (log-sum-exp of the scores, float32; float64 for float64 inputs), with gradients.

    Raises:
        ValueError: n is no multiple of g.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")
    return _fwd(query, key, value, kv_start, kv_end, scale)
