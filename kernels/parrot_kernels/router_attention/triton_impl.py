"""Triton `router_attention`: FlashAttention-2 (arXiv 2307.08691) over packed samples, with two more value columns.

Forward: one program for each tile of query rows, head and sample. Backward, without atomics: one kernel by query tiles
(delta and the gradient of the query), one by key tiles (key, value, and the columns' gradient by key head and key), and
one that adds the latter up over samples and heads, position by position.

The columns are summed along the rows of the tile of weights while it is in registers. Their part in delta is
sum_c grad_extra[h, i, c] * extra[h, i, c], which is why `extra` stays apart by head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import attention_tiles as tiles
from parrot_kernels.launches import launch
from parrot_kernels.router_attention import kernels
from parrot_kernels.tile_choice import cdiv, next_power_of_2

# T query rows, M key rows, S samples, n query heads, g key/value heads, d head width, P positions

Grads = tuple[Tensor, ...]
Needs = tuple[bool, bool, bool, bool]

_POSITIONS = 32  # positions of one program of the columns' gradient


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs, and heads of at most 512 bytes."""
    return tiles.why_not(*args)


def router_attention_fwd(
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
    """See the contract in the package docstring."""
    num_rows, num_heads, width = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_rows, dtype=torch.float32)
    extra = lse.new_empty(num_heads, num_rows, 2)
    if num_rows:
        lengths = max_seqlen_q, max_seqlen_kv, num_heads, cu_seqlens_q.shape[0] - 1
        tiles.by_rows(kernels.fwd_kernel, tiles.FWD_TILES, query, *lengths)(
            query,
            key,
            value,
            columns.contiguous(),
            cu_seqlens_q,
            cu_seqlens_kv,
            positions,
            out,
            extra,
            lse,
            *tiles.strides(query, key, value),
            num_rows,
            columns.shape[0],
            scale * tiles.LOG2_E.value,
            GROUP=num_heads // key.shape[1],
            WIDTH=width,
            D=tiles.tile_width(width),
        )
    return out, extra, lse


def router_attention_bwd(
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
    needs: Needs,
) -> Grads:
    """See the contract in the package docstring."""
    num_rows, num_heads, width = query.shape
    num_keys, kv_heads, _ = key.shape
    num_samples = cu_seqlens_q.shape[0] - 1
    grad_query, grad_key, grad_value = (
        own.new_empty(own.shape) if needed else None for own, needed in zip((query, key, value), needs, strict=False)
    )
    partial = lse.new_empty(kv_heads, num_keys, 2) if needs[3] else None
    columns, grad_out = columns.contiguous(), grad_out.contiguous()
    if grad_extra is not None and grad_extra.stride()[1:] != (2, 1):
        grad_extra = grad_extra.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    inputs = (query, key, value, columns, cu_seqlens_q, cu_seqlens_kv, positions)
    strides = (0 if grad_extra is None else grad_extra.stride(0), *tiles.strides(query, key, value))
    scales = (scale * tiles.LOG2_E.value, scale)
    sizes = {"GROUP": num_heads // kv_heads, "WIDTH": width, "D": tiles.tile_width(width)}
    if num_rows:
        outputs = (out, extra, lse, delta, grad_query)
        counts = (num_rows, columns.shape[0])
        lengths = max_seqlen_q, max_seqlen_kv, num_heads, num_samples
        tiles.by_rows(kernels.query_bwd_kernel, tiles.QUERY_BWD_TILES, query, *lengths)(
            grad_out, grad_extra, grad_lse, *inputs, *outputs, *strides, *counts, *scales, **sizes
        )
    if num_keys and any(needs[1:]):
        key_outputs = (lse, delta, grad_key, grad_value, partial)
        key_counts = (num_rows, num_keys, columns.shape[0])
        lengths = max_seqlen_kv, max_seqlen_q, kv_heads, num_samples
        tiles.by_keys(kernels.key_bwd_kernel, tiles.KEY_BWD_TILES, query, *lengths)(
            grad_out, grad_extra, *inputs, *key_outputs, *strides, *key_counts, *scales, **sizes
        )
    grad_columns = columns.new_empty(columns.shape) if needs[3] else None
    if partial is not None and columns.shape[0]:
        launch(kernels.column_bwd_kernel, (cdiv(columns.shape[0], _POSITIONS),))(
            partial,
            *inputs[4:],
            grad_columns,
            num_samples,
            num_keys,
            columns.shape[0],
            KV_HEADS=kv_heads,
            HEADS=next_power_of_2(kv_heads),
            P=_POSITIONS,
        )
    grads = (grad_query, grad_key, grad_value, grad_columns)
    returned = [query.new_empty(0) if grad is None else grad for grad in grads]
    return returned[0], returned[1], returned[2], returned[3]
