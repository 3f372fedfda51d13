"""Triton `segment_attention`: FlashAttention-2 (arXiv 2307.08691) with a range of keys for each query row.

Forward and the query's gradient: one program for each tile of query rows and head, over the keys between the first and
the last that some row of the tile sees. Gradients of key and value: one program for each tile of keys and key head,
which looks through all ranges for the first and the last row that sees a key of the tile; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import attention_tiles as tiles

# T query rows, M key rows, n query heads, g key/value heads, d head width.
# In kernels: M query rows and N key rows of a tile; WIDTH <= D columns of a head; GROUP query heads share a key head.

Grads = tuple[Tensor, ...]

_SCAN = tl.constexpr(1024)  # ranges that a key tile looks at together


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs, and heads of at most 512 bytes."""
    return tiles.why_not(*args)


@triton.jit
def _ranges(start_ptr, end_ptr, rows, num_rows):
    """The range of keys of each row, and the smallest one that holds them all."""
    start = tl.load(start_ptr + rows, mask=rows < num_rows, other=0)
    end = tl.load(end_ptr + rows, mask=rows < num_rows, other=0)
    high = tl.max(tl.where(start < end, end, 0), 0)
    return start, end, tl.min(tl.where(start < end, start, high), 0), high


@triton.jit
def _seeing_rows(start_ptr, end_ptr, num_rows, first_key, last_key):
    """The first row that sees one of the keys [first_key, last_key), and one past the last such row."""
    low, high = num_rows, 0
    for begin in range(0, num_rows, _SCAN):
        rows = begin + tl.arange(0, _SCAN)
        start = tl.load(start_ptr + rows, mask=rows < num_rows, other=0)
        end = tl.load(end_ptr + rows, mask=rows < num_rows, other=0)
        sees = (start < last_key) & (end > first_key) & (start < end)
        low = tl.minimum(low, tl.min(tl.where(sees, rows, num_rows), 0))
        high = tl.maximum(high, tl.max(tl.where(sees, rows + 1, 0), 0))
    return low, high


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_rows, num_keys, scale2,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    start, end, low, high = _ranges(start_ptr, end_ptr, rows, num_rows)
    q = tiles.load_rows(q_ptr + head * stride_qh, rows, stride_qt, num_rows, True, WIDTH, D)
    state = tiles.attend(
        tiles.start_attending(M, D), q, k_ptr, v_ptr, None, stride_kt, stride_vt, start, end, low, high, num_keys,
        0, 0, scale2, True, False, WIDTH, N, D,
    )  # fmt: skip
    out, _, _, lse = tiles.finish_attending(state)
    tiles.store_rows(out_ptr + head * WIDTH, rows, tl.num_programs(1) * WIDTH, num_rows, out, WIDTH, D)
    tl.store(lse_ptr + head * num_rows + rows, lse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _query_bwd_kernel(
    grad_out_ptr, grad_lse_ptr, q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_rows, num_keys, scale2, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """delta, and the gradient of the query unless `grad_q_ptr` is None."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    inside = rows < num_rows
    stride_ot = tl.num_programs(1) * WIDTH
    grad_out = tiles.load_rows(grad_out_ptr + head * WIDTH, rows, stride_ot, num_rows, True, WIDTH, D)
    out = tiles.load_rows(out_ptr + head * WIDTH, rows, stride_ot, num_rows, True, WIDTH, D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    of_head = head * num_rows + rows
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + of_head, mask=inside, other=0.0)
    tl.store(delta_ptr + of_head, delta, mask=inside)

    if grad_q_ptr is not None:
        k_ptr += head // GROUP * stride_kh
        v_ptr += head // GROUP * stride_vh
        start, end, low, high = _ranges(start_ptr, end_ptr, rows, num_rows)
        q = tiles.load_rows(q_ptr + head * stride_qh, rows, stride_qt, num_rows, True, WIDTH, D)
        lse2 = tl.load(lse_ptr + of_head, mask=inside, other=float("inf")) * tiles.LOG2_E
        grad_q = tiles.add_query_gradient(
            tl.zeros([M, D], tl.float32), q, grad_out, lse2, delta, None, None, k_ptr, v_ptr, None, stride_kt,
            stride_vt, start, end, low, high, num_keys, 0, 0, scale2, True, False, WIDTH, N, D,
        )  # fmt: skip
        tiles.store_rows(grad_q_ptr + head * WIDTH, rows, stride_ot, num_rows, grad_q * scale, WIDTH, D)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _key_bwd_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, num_rows, num_keys, scale2, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Those gradients of key and value whose pointers are not None."""
    first_key, kv_head = tl.program_id(0) * N, tl.program_id(1).to(tl.int64)
    keys = first_key + tl.arange(0, N)
    k = tiles.load_rows(k_ptr + kv_head * stride_kh, keys, stride_kt, num_keys, True, WIDTH, D)
    v = tiles.load_rows(v_ptr + kv_head * stride_vh, keys, stride_vt, num_keys, True, WIDTH, D)
    low, high = _seeing_rows(start_ptr, end_ptr, num_rows, first_key, first_key + N)
    low = low // M * M
    stride_ot = tl.num_programs(1) * GROUP * WIDTH
    tile, line = tl.zeros([N, D], tl.float32), tl.zeros([N], tl.float32)
    state = tile, tile, line, line
    for member in range(GROUP):
        head = kv_head * GROUP + member
        state = tiles.add_key_gradients(
            state, keys, k, v, None, None, q_ptr + head * stride_qh, grad_out_ptr + head * WIDTH,
            lse_ptr + head * num_rows, delta_ptr + head * num_rows, None, start_ptr, end_ptr, None, False,
            stride_qt, stride_ot, low, high, num_rows, 0, scale2, False, WIDTH, M, D,
        )  # fmt: skip
    grad_k, grad_v, _, _ = state
    stride_gt = tl.num_programs(1) * WIDTH
    if grad_k_ptr is not None:
        tiles.store_rows(grad_k_ptr + kv_head * WIDTH, keys, stride_gt, num_keys, grad_k * scale, WIDTH, D)
    if grad_v_ptr is not None:
        tiles.store_rows(grad_v_ptr + kv_head * WIDTH, keys, stride_gt, num_keys, grad_v, WIDTH, D)


def segment_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, num_heads, width = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_rows, dtype=torch.float32)
    if num_rows:
        sizes = {"GROUP": num_heads // key.shape[1], "WIDTH": width, "D": tiles.tile_width(width)}
        strides = tiles.strides(query, key, value)
        tiles.by_rows(_fwd_kernel, tiles.FWD_TILES, query, num_rows, key.shape[0], num_heads)(
            query, key, value, kv_start, kv_end, out, lse, *strides, num_rows, key.shape[0], scale * tiles.LOG2_E.value,
            **sizes,
        )  # fmt: skip
    return out, lse


def segment_attention_bwd(
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
    needs: tuple[bool, bool, bool],
) -> Grads:
    """See the contract in the package docstring."""
    num_rows, num_heads, width = query.shape
    num_keys, kv_heads, _ = key.shape
    grad_query, grad_key, grad_value = (
        own.new_empty(own.shape) if needed else None for own, needed in zip((query, key, value), needs, strict=True)
    )
    grad_out, grad_lse = grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    inputs = (query, key, value, kv_start, kv_end)
    sizes = (*tiles.strides(query, key, value), num_rows, num_keys, scale * tiles.LOG2_E.value, scale)
    tile = {"GROUP": num_heads // kv_heads, "WIDTH": width, "D": tiles.tile_width(width)}
    if num_rows:
        tiles.by_rows(_query_bwd_kernel, tiles.QUERY_BWD_TILES, query, num_rows, num_keys, num_heads)(
            grad_out, grad_lse, *inputs, out, lse, delta, grad_query, *sizes, **tile
        )
    if num_keys and (needs[1] or needs[2]):
        tiles.by_keys(_key_bwd_kernel, tiles.KEY_BWD_TILES, query, num_keys, num_rows, kv_heads)(
            grad_out, *inputs, lse, delta, grad_key, grad_value, *sizes, **tile
        )
    grads = (grad_query, grad_key, grad_value)
    returned = [query.new_empty(0) if grad is None else grad for grad in grads]
    return returned[0], returned[1], returned[2]
