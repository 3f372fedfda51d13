"""`paged_attention`: rows of requests attend to what a paged cache holds of them; for inference, without gradients."""

from __future__ import annotations

from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype
from parrot_sys.ops._operator import operator


@operator("paged_attention")
def _fwd(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    columns: Tensor | None,
    visible: Tensor | None,
    max_seqlen_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    requests = (block_tables, cu_seqlens_q, kv_lengths)
    args = (query, key_cache, value_cache, *requests, columns, visible, max_seqlen_q, scale)
    return registry.select("paged_attention", *args).paged_attention(*args)


@_fwd.register_fake
def _(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    columns: Tensor | None,
    visible: Tensor | None,
    max_seqlen_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if columns is None else (query.shape[1], query.shape[0], 2)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=accumulate_dtype(query.dtype))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    columns: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of each request's last rows to all rows that a paged cache holds of the request.

    One call serves answers that grow by a row and prompts that are read in pieces; rows of requests that share blocks
    read the same memory. Keys and values of the query rows must be in the cache already.

    Args:
        query: [T, n, d], rows of S requests, one after the other.
        key_cache: [B, g, N, d], B blocks of N rows, dtype of `query`; query head h reads head h // (n / g).
        value_cache: [B, g, N, d].
        block_tables: [S, W] int32, blocks of each request; entries after its last one are not looked at.
        cu_seqlens_q: [S + 1] int32, boundaries of the requests' query rows, with a leading 0.
        kv_lengths: [S] int32, rows of each request in the cache, its query rows included.
        max_seqlen_q: the most query rows of a request, or more.
        scale: positive factor of the scores, usually 1 / sqrt(d).
        columns: [P, 2] float, what each position of a request adds to `extra`.
        visible: [B, N] bool, rows of the cache that may be seen; None: all of them.

    Returns:
        out [T, n, d], and with columns extra [T, 2]: their sums by the attention weights, over all heads, in float32
        (float64 for float64 inputs). A row that sees nothing has zeros.

    Raises:
        ValueError: n is no multiple of g, or the caches or `columns` have another shape.
    """
    if key_cache.shape != value_cache.shape or key_cache.dim() != 4 or key_cache.shape[3] != query.shape[2]:
        raise ValueError(
            f"key_cache and value_cache must have shape [blocks, heads, rows, {query.shape[2]}], got "
            f"{list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    if query.shape[1] % key_cache.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key_cache.shape[1]}")
    if columns is not None and (columns.dim() != 2 or columns.shape[1] != 2):
        raise ValueError(f"columns must have shape [positions, 2], got {list(columns.shape)}")
    requests = (block_tables, cu_seqlens_q, kv_lengths)
    out, extra = _fwd(query, key_cache, value_cache, *requests, columns, visible, max_seqlen_q, scale)
    return out, None if columns is None else extra.sum(0)
