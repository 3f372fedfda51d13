"""Triton kernels of `router_attention`; `triton_impl` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from parrot_kernels import attention_tiles as tiles

# M query rows and N key rows of a tile; WIDTH <= D columns of a head; GROUP query heads share a key head


@triton.jit
def _sample(sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr):
    """First query row, number of rows, first key row, number of keys, causal shift, position of the first key.

    Row i of the sample sees its keys up to i + causal shift.
    """
    first_row, first_key = tl.load(cu_seqlens_q_ptr + sample), tl.load(cu_seqlens_kv_ptr + sample)
    num_rows = tl.load(cu_seqlens_q_ptr + sample + 1) - first_row
    num_keys = tl.load(cu_seqlens_kv_ptr + sample + 1) - first_key
    if positions_ptr is None:
        key_position = 0
        shift = num_keys - num_rows
    else:
        key_position = tl.load(positions_ptr + sample * 2 + 1)
        shift = tl.load(positions_ptr + sample * 2) - key_position
    return first_row, num_rows, first_key, num_keys, shift, key_position


@triton.jit(do_not_specialize=["total_rows", "num_columns"])
def fwd_kernel(
    q_ptr, k_ptr, v_ptr, column_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr, out_ptr, extra_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, total_rows, num_columns, scale2,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out, extra and lse of one tile of query rows of one head."""
    # The last tiles of a sample see the most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, first_key, num_keys, shift, key_position = _sample(
        sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr
    )
    if block * M >= num_rows:
        return
    rows = block * M + tl.arange(0, M)
    q_ptr += first_row.to(tl.int64) * stride_qt + head * stride_qh
    k_ptr += first_key.to(tl.int64) * stride_kt + head // GROUP * stride_kh
    v_ptr += first_key.to(tl.int64) * stride_vt + head // GROUP * stride_vh
    q = tiles.load_rows(q_ptr, rows, stride_qt, num_rows, True, WIDTH, D)
    start, end = tl.zeros_like(rows), tl.minimum(rows + shift + 1, num_keys)
    # Every row of the tile sees the keys of the first loop; in the second the rows end one after the other.
    full = tl.maximum(tl.minimum(block * M + shift + 1, num_keys), 0) // N * N
    high = tl.minimum(block * M + M + shift, num_keys)
    state = tiles.start_attending(M, D)
    state = tiles.attend(
        state, q, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt, start, end, 0, full, num_keys, key_position,
        num_columns, scale2, False, True, WIDTH, N, D,
    )  # fmt: skip
    state = tiles.attend(
        state, q, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt, start, end, full, high, num_keys, key_position,
        num_columns, scale2, True, True, WIDTH, N, D,
    )  # fmt: skip
    out, extra0, extra1, lse = tiles.finish_attending(state)
    heads = tl.num_programs(1)
    out_ptr += first_row.to(tl.int64) * heads * WIDTH + head * WIDTH
    tiles.store_rows(out_ptr, rows, heads * WIDTH, num_rows, out, WIDTH, D)
    of_head = head * total_rows + first_row
    tiles.store_pairs(extra_ptr + of_head * 2, rows, rows < num_rows, extra0, extra1)
    tl.store(lse_ptr + of_head + rows, lse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["total_rows", "stride_gh"])
def delta_kernel(
    grad_out_ptr, grad_extra_ptr, grad_lse_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr, out_ptr, extra_ptr,
    delta_ptr, stride_gh, total_rows,
    WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta = grad_out . out + grad_extra . extra - grad_lse of one tile of query rows of one head."""
    block, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, _, _, _, _ = _sample(sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr)
    if block * M >= num_rows:
        return
    rows = block * M + tl.arange(0, M)
    stride_ot = tl.num_programs(1) * WIDTH
    at_out = first_row.to(tl.int64) * stride_ot + head * WIDTH
    of_head = head * total_rows + first_row
    inside = rows < num_rows
    grad_out = tiles.load_rows(grad_out_ptr + at_out, rows, stride_ot, num_rows, True, WIDTH, D)
    out = tiles.load_rows(out_ptr + at_out, rows, stride_ot, num_rows, True, WIDTH, D)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    if grad_extra_ptr is not None:
        own = grad_extra_ptr + head * stride_gh + first_row.to(tl.int64) * 2
        grad_extra0, grad_extra1 = tiles.load_pairs(own, rows, inside)
        extra0, extra1 = tiles.load_pairs(extra_ptr + of_head * 2, rows, inside)
        delta += grad_extra0 * extra0 + grad_extra1 * extra1
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + of_head + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + of_head + rows, delta, mask=inside)


@triton.jit
def _first_seeing(first_key, shift, num_rows, M):
    """Start of the first tile of query rows that sees `first_key` or a later key."""
    return tl.minimum(tl.maximum(first_key - shift, 0), num_rows) // M * M


@triton.jit
def _query_parts(ptr, strip, head, sample, first_row, total_rows, D: tl.constexpr, M: tl.constexpr):
    """Where the tiles of a sample start in [strips, n, tiles, D, M]: a sample fills its last one only partly."""
    tiles_of_head = total_rows // M + tl.num_programs(2)
    tile = (strip * tl.num_programs(1) + head) * tiles_of_head + first_row // M + sample
    return ptr + tile * (D * M)


@triton.jit(do_not_specialize=["total_rows", "total_keys", "num_columns", "stride_gh"])
def bwd_kernel(
    grad_out_ptr, grad_extra_ptr, q_ptr, k_ptr, v_ptr, column_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr,
    lse_ptr, delta_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_column_ptr, stride_gh, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, total_rows, total_keys, num_columns, scale2, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Those gradients whose pointers are not None, of one head: of key and value (each [M, n, d]), of the columns by
    head and key ([n, M, 2]), and this program's part of that of the query, divided by the scale (`_query_parts`).

    A program takes every `num_programs(0)`-th key tile, its strip, one after the other. So a part of the query's
    gradient has one owner, which adds to it in the order of the keys.
    """
    strip, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, first_key, num_keys, shift, key_position = _sample(
        sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr
    )
    strips, heads = tl.num_programs(0), tl.num_programs(1)
    q_ptr += first_row.to(tl.int64) * stride_qt + head * stride_qh
    k_ptr += first_key.to(tl.int64) * stride_kt + head // GROUP * stride_kh
    v_ptr += first_key.to(tl.int64) * stride_vt + head // GROUP * stride_vh
    stride_ot = heads * WIDTH
    grad_out_ptr += first_row.to(tl.int64) * stride_ot + head * WIDTH
    of_head = head * total_rows + first_row
    at_key = first_key.to(tl.int64) * stride_ot + head * WIDTH
    if grad_extra_ptr is not None:
        grad_extra_ptr += head * stride_gh + first_row.to(tl.int64) * 2
    if grad_q_ptr is not None:
        grad_q_ptr = _query_parts(grad_q_ptr, strip, head, sample, first_row, total_rows, D, M)
    for first in tl.range(strip * N, num_keys, strips * N):
        keys = first + tl.arange(0, N)
        k = tiles.load_rows(k_ptr, keys, stride_kt, num_keys, True, WIDTH, D)
        v = tiles.load_rows(v_ptr, keys, stride_vt, num_keys, True, WIDTH, D)
        column0, column1 = tiles.load_key_columns(column_ptr, keys, num_keys, key_position, num_columns)
        tile, line = tl.zeros([N, D], tl.float32), tl.zeros([N], tl.float32)
        state = tile, tile, line, line
        grad_k, grad_v, grad_column0, grad_column1 = tiles.add_key_gradients(
            state, keys, k, v, column0, column1, q_ptr, grad_out_ptr, lse_ptr + of_head, delta_ptr + of_head,
            grad_extra_ptr, None, None, grad_q_ptr, first > strip * N, stride_qt, stride_ot,
            _first_seeing(first, shift, num_rows, M), num_rows, num_rows, shift, scale2,
            grad_extra_ptr is not None, WIDTH, M, D,
        )  # fmt: skip
        if grad_k_ptr is not None:
            tiles.store_rows(grad_k_ptr + at_key, keys, stride_ot, num_keys, grad_k * scale, WIDTH, D)
        if grad_v_ptr is not None:
            tiles.store_rows(grad_v_ptr + at_key, keys, stride_ot, num_keys, grad_v, WIDTH, D)
        if grad_column_ptr is not None:
            own = grad_column_ptr + (head * total_keys + first_key) * 2
            tiles.store_pairs(own, keys, keys < num_keys, grad_column0, grad_column1)
        if grad_q_ptr is not None:
            tl.debug_barrier()  # other threads may read what was stored when the next key tile comes to these rows


@triton.jit(do_not_specialize=["total_rows", "strips", "key_tile"])
def query_sum_kernel(
    partial_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr, grad_q_ptr, total_rows, strips, key_tile, scale,
    WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Adds up the parts that the strips of `bwd_kernel` (with tiles M x `key_tile`) have left, in their order."""
    block, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, _, num_keys, shift, _ = _sample(sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr)
    if block * M >= num_rows:
        return
    total = tl.zeros([D, M], tl.float32)
    for strip in range(strips):
        # A strip has nothing for the rows that do not see its first tile.
        first_key = strip * key_tile
        if (first_key < num_keys) & (block * M >= _first_seeing(first_key, shift, num_rows, M)):
            own = _query_parts(partial_ptr, strip, head, sample, first_row, total_rows, D, M) + block * (D * M)
            total += tl.load(own + tl.arange(0, D)[:, None] * M + tl.arange(0, M)[None, :])
    stride_gt = tl.num_programs(1) * WIDTH
    own = grad_q_ptr + first_row.to(tl.int64) * stride_gt + head * WIDTH
    tiles.store_rows(own, block * M + tl.arange(0, M), stride_gt, num_rows, tl.trans(total) * scale, WIDTH, D)


@triton.jit(do_not_specialize=["num_samples", "total_keys", "num_columns"])
def column_bwd_kernel(
    partial_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr, grad_column_ptr, num_samples, total_keys,
    num_columns,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[n, M, 2] by head and key -> [P, 2] by position."""
    positions = tl.program_id(0) * P + tl.arange(0, P)
    heads = tl.arange(0, HEADS).to(tl.int64)
    sum0, sum1 = tl.zeros([P, HEADS], tl.float32), tl.zeros([P, HEADS], tl.float32)
    for sample in range(num_samples):
        _, _, first_key, num_keys, _, key_position = _sample(sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr)
        keys = positions - key_position
        inside = ((keys >= 0) & (keys < num_keys))[:, None] & (heads < NUM_HEADS)[None, :]
        first, second = tiles.load_pairs(partial_ptr, heads[None, :] * total_keys + (first_key + keys)[:, None], inside)
        sum0 += first
        sum1 += second
    tiles.store_pairs(grad_column_ptr, positions, positions < num_columns, tl.sum(sum0, 1), tl.sum(sum1, 1))
