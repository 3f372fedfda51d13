"""Triton `router_attention`: FlashAttention-2 (arXiv 2307.08691) over packed samples, with two more value columns.

Forward: one program for each tile of query rows, head and sample. Backward, without atomics: delta by query rows; one
kernel by strips of key tiles for all gradients, which forms scores and gradients of weights once (five products); and
sums in a fixed order, of the query's gradient over the strips, of the columns' over heads and samples.

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
_ROWS = 32  # query rows of one program that only passes over them


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
    lengths = (cu_seqlens_q, cu_seqlens_kv, positions)
    others = (num_heads, cu_seqlens_q.shape[0] - 1)
    grad_query, grad_key, grad_value, grad_columns = (
        own.new_empty(own.shape) if needed else None
        for own, needed in zip((query, key, value, columns), needs, strict=True)
    )
    columns, grad_out = columns.contiguous(), grad_out.contiguous()
    if grad_extra is not None and grad_extra.stride()[1:] != (2, 1):
        grad_extra = grad_extra.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    stride_gh = 0 if grad_extra is None else grad_extra.stride(0)
    sizes = {"WIDTH": width, "D": tiles.tile_width(width)}
    if num_rows:
        launch(kernels.delta_kernel, (cdiv(max_seqlen_q, _ROWS), *others))(
            grad_out, grad_extra, grad_lse, *lengths, out, extra, delta, stride_gh, num_rows, **sizes, M=_ROWS
        )
    # Query heads that share a key head leave its gradients apart.
    shared = num_heads != kv_heads
    by_head = [
        lse.new_empty(num_keys, num_heads, width) if shared and own is not None else own
        for own in (grad_key, grad_value)
    ]
    of_columns = None if grad_columns is None else lse.new_empty(num_heads, num_keys, 2)
    if num_keys:
        run, strips, tile = tiles.by_strips(
            kernels.bwd_kernel, tiles.STRIP_TILES, query, max_seqlen_kv, max_seqlen_q, *others
        )
        parts = (strips, num_heads, num_rows // tile["M"] + others[1], sizes["D"], tile["M"])
        of_query = None if grad_query is None else lse.new_empty(parts)
        run(
            grad_out,
            grad_extra,
            query,
            key,
            value,
            columns,
            *lengths,
            lse,
            delta,
            of_query,
            *by_head,
            of_columns,
            stride_gh,
            *tiles.strides(query, key, value),
            num_rows,
            num_keys,
            columns.shape[0],
            scale * tiles.LOG2_E.value,
            scale,
            GROUP=num_heads // kv_heads,
            **sizes,
        )
        if of_query is not None and num_rows:
            launch(kernels.query_sum_kernel, (cdiv(max_seqlen_q, tile["M"]), *others))(
                of_query, *lengths, grad_query, num_rows, strips, tile["N"], scale, **sizes, M=tile["M"]
            )
    elif grad_query is not None:
        grad_query.zero_()
    if shared:
        grad_key, grad_value = (
            None if own is None else own.unflatten(1, (kv_heads, -1)).sum(2).to(key.dtype) for own in by_head
        )
    if of_columns is not None and columns.shape[0]:
        launch(kernels.column_bwd_kernel, (cdiv(columns.shape[0], _POSITIONS),))(
            of_columns,
            *lengths,
            grad_columns,
            others[1],
            num_keys,
            columns.shape[0],
            NUM_HEADS=num_heads,
            HEADS=next_power_of_2(num_heads),
            P=_POSITIONS,
        )
    grads = (grad_query, grad_key, grad_value, grad_columns)
    returned = [query.new_empty(0) if grad is None else grad for grad in grads]
    return returned[0], returned[1], returned[2], returned[3]
