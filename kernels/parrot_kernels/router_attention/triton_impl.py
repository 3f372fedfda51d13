"""Triton `router_attention`: FlashAttention-2 (arXiv 2307.08691) over packed samples, with two more value columns.

Forward: one program for each tile of query rows, head and sample. Backward, without atomics: delta by query rows; one
kernel by strips of key tiles for all gradients, which forms scores and gradients of weights once (five products); and
sums in a fixed order, of the query's gradient over the strips, of the columns' over heads and samples.

The columns are summed along the rows of the tile of weights while it is in registers. Their part in delta is
sum_c grad_extra[h, i, c] * extra[h, i, c], which is why `extra` stays apart by head.
"""

from __future__ import annotations

from typing import NamedTuple

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


class _Samples(NamedTuple):
    """Where the samples of a pack are."""

    lengths: tuple[Tensor, Tensor, Tensor | None]
    """cu_seqlens_q, cu_seqlens_kv, positions."""
    max_seqlen_q: int
    max_seqlen_kv: int

    @property
    def number(self) -> int:
        return self.lengths[0].shape[0] - 1


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


def _sizes(query: Tensor) -> dict[str, int]:
    return {"WIDTH": query.shape[2], "D": tiles.tile_width(query.shape[2])}


def _delta(
    grad_out: Tensor, grad_extra: Tensor | None, grad_lse: Tensor | None, samples: _Samples, out: Tensor, extra: Tensor
) -> Tensor:
    """[n, T]: of each row and head the mean gradient of its weights."""
    num_rows, num_heads, _ = out.shape
    delta = extra.new_empty(extra.shape[:2])
    if num_rows:
        grid = cdiv(samples.max_seqlen_q, _ROWS), num_heads, samples.number
        stride = 0 if grad_extra is None else grad_extra.stride(0)
        launch(kernels.delta_kernel, grid)(
            grad_out, grad_extra, grad_lse, *samples.lengths, out, extra, delta, stride, num_rows, **_sizes(out),
            M=_ROWS,
        )  # fmt: skip
    return delta


def _grad_columns(parts: Tensor, samples: _Samples, columns: Tensor) -> Tensor:
    """Gradient of the columns [P, 2] from its parts by head and key [n, M, 2]."""
    grad, (num_heads, num_keys, _) = columns.new_empty(columns.shape), parts.shape
    if columns.shape[0]:
        launch(kernels.column_bwd_kernel, (cdiv(columns.shape[0], _POSITIONS),))(
            parts, *samples.lengths, grad, samples.number, num_keys, columns.shape[0],
            NUM_HEADS=num_heads, HEADS=next_power_of_2(num_heads), P=_POSITIONS,
        )  # fmt: skip
    return grad


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
    samples = _Samples((cu_seqlens_q, cu_seqlens_kv, positions), max_seqlen_q, max_seqlen_kv)
    needs_query, *needs_pair, needs_columns = needs
    columns, grad_out = columns.contiguous(), grad_out.contiguous()
    if grad_extra is not None and grad_extra.stride()[1:] != (2, 1):
        grad_extra = grad_extra.contiguous()
    delta = _delta(grad_out, grad_extra, None if grad_lse is None else grad_lse.contiguous(), samples, out, extra)
    # Query heads that share a key head leave its gradients apart, in float32.
    shared = num_heads != kv_heads
    pair = [
        (lse if shared else query).new_empty(num_keys, num_heads, width) if needed else None for needed in needs_pair
    ]
    of_columns = lse.new_empty(num_heads, num_keys, 2) if needs_columns else None
    grad_query = None
    if needs_query:
        grad_query = query.new_empty(query.shape) if num_keys else query.new_zeros(query.shape)
    if num_keys:
        others = num_heads, samples.number
        run, strips, tile = tiles.by_strips(
            kernels.bwd_kernel, tiles.STRIP_TILES, query, max_seqlen_kv, max_seqlen_q, *others
        )
        sizes, rows = _sizes(query), tile["M"]
        parts = (strips, num_heads, num_rows // rows + samples.number, sizes["D"], rows)
        of_query = lse.new_empty(parts) if needs_query else None
        run(
            grad_out, grad_extra, query, key, value, columns, *samples.lengths, lse, delta, of_query, *pair, of_columns,
            0 if grad_extra is None else grad_extra.stride(0), *tiles.strides(query, key, value),
            num_rows, num_keys, columns.shape[0], scale * tiles.LOG2_E.value, scale,
            GROUP=num_heads // kv_heads, **sizes,
        )  # fmt: skip
        if needs_query and num_rows:
            launch(kernels.query_sum_kernel, (cdiv(max_seqlen_q, rows), *others))(
                of_query, *samples.lengths, grad_query, num_rows, strips, tile["N"], scale, **sizes, M=rows
            )
    if shared:
        pair = [own if own is None else own.unflatten(1, (kv_heads, -1)).sum(2).to(key.dtype) for own in pair]
    grads = (grad_query, *pair, None if of_columns is None else _grad_columns(of_columns, samples, columns))
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)
