"""`router_attention`: causal attention over packed samples that also attends to two more value columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator


@operator("router_attention")
def _fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (query, key, value, columns, cu_seqlens_q, cu_seqlens_kv, positions, max_seqlen_q, max_seqlen_kv, scale)
    return registry.select("router_attention", *args).router_attention_fwd(*args)


@_fwd.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_heads, _ = query.shape
    lse = query.new_empty(num_heads, num_rows, dtype=accumulate_dtype(query.dtype))
    return query.new_empty(query.shape), lse.new_empty(*lse.shape, 2), lse


@operator("router_attention_bwd")
def _bwd(
    grad_out: Tensor,
    grad_extra: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    out: Tensor,
    extra: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, sizes = (query, key, value, columns, cu_seqlens_q, cu_seqlens_kv, positions), (max_seqlen_q, max_seqlen_kv)
    impl = registry.select("router_attention", *tensors, *sizes, scale)
    grads = (grad_out, grad_extra, grad_lse)
    return impl.router_attention_bwd(*grads, *tensors, out, extra, lse, *sizes, scale, tuple(needs))


@_bwd.register_fake
def _(
    grad_out: Tensor,
    grad_extra: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    out: Tensor,
    extra: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key = like_or_empty(query, needs[0]), like_or_empty(key, needs[1])
    return grad_query, grad_key, like_or_empty(value, needs[2]), like_or_empty(columns, needs[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen_q, ctx.max_seqlen_kv, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, extra, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grad_out = torch.zeros_like(out) if grad_outputs[0] is None else grad_outputs[0]
    sizes = (ctx.max_seqlen_q, ctx.max_seqlen_kv)
    grads = _bwd(grad_out, *grad_outputs[1:], *tensors, out, extra, lse, *sizes, ctx.scale, needs)
    return *map(or_none, grads, needs), None, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def router_attention_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`router_attention` with `extra` apart by head, and with slices of sequences: what context parallelism combines.

    With parts p of the keys, `lse = logsumexp_p lse_p`, and out and extra are sums over p of the parts' times
    `exp(lse_p - lse)`, head by head. The other arguments and the errors are those of `router_attention`.

    Args:
        positions: [S, 2] int32, position in its sequence of the first query row and of the first key row of each
            sample; None as in `router_attention`.

    Returns:
        out [T, n, d], extra [n, T, 2] and lse [n, T]; all with gradients, extra and lse in float32 (float64 for
        float64 inputs). A row that sees no key has 0, 0 and -inf.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")
    if columns.dim() != 2 or columns.shape[1] != 2:
        raise ValueError(f"columns must have shape [positions, 2], got {list(columns.shape)}")
    if columns.shape[0] < max_seqlen_kv:
        raise ValueError(f"columns have {columns.shape[0]} positions, the longest sample has {max_seqlen_kv} rows")
    lengths = (cu_seqlens_q, cu_seqlens_kv, positions, max_seqlen_q, max_seqlen_kv)
    return _fwd(query, key, value, columns, *lengths, scale)


def router_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over packed samples, and its weights, summed over heads, times two columns.

    `extra[i] = sum over heads h and keys j of weights[h, i, j] * columns[position of j in its sample]` is what the
    router of Wings (arXiv 2406.03496) adds bias and SiLU after it, without the matrix of weights. With heads split
    over tensor-parallel ranks, `extra` must be summed over them.

    Args:
        query: [T, n, d].
        key: [M, g, d], dtype of `query`; query head h reads head h // (n / g).
        value: [M, g, d], dtype of `query`.
        columns: [P, 2] float, P at least the longest sample.
        cu_seqlens_q: [S + 1] int32, boundaries of the samples' query rows, with a leading 0.
        cu_seqlens_kv: [S + 1] int32, boundaries of their key rows. With more keys than queries (a key/value cache),
            the last query row sees all keys.
        max_seqlen_q: length of the longest sample, or more.
        max_seqlen_kv: the same for key rows.
        scale: positive factor of the scores, usually 1 / sqrt(d).

    Returns:
        out [T, n, d], extra [T, 2] and lse [n, T] (log-sum-exp of the scores); all with gradients, extra and lse in
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: n is no multiple of g, or `columns` is not [P, 2] or has fewer positions than the longest sample.
    """
    out, extra, lse = router_attention_parts(
        query,
        key,
        value,
        columns,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        scale=scale,
    )
    return out, extra.sum(0), lse
