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


@triton.jit(do_not_specialize=["total_rows", "num_columns", "stride_gh"])
def query_bwd_kernel(
    grad_out_ptr, grad_extra_ptr, grad_lse_ptr, q_ptr, k_ptr, v_ptr, column_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr,
    positions_ptr, out_ptr, extra_ptr, lse_ptr, delta_ptr, grad_q_ptr, stride_gh, stride_qt, stride_qh, stride_kt,
    stride_kh, stride_vt, stride_vh, total_rows, num_columns, scale2, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """delta, and the gradient of the query unless `grad_q_ptr` is None."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, first_key, num_keys, shift, key_position = _sample(
        sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr
    )
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
    grad_extra0, grad_extra1 = tl.zeros_like(delta), tl.zeros_like(delta)
    if grad_extra_ptr is not None:
        own = grad_extra_ptr + head * stride_gh + first_row.to(tl.int64) * 2
        grad_extra0, grad_extra1 = tiles.load_pairs(own, rows, inside)
        extra0, extra1 = tiles.load_pairs(extra_ptr + of_head * 2, rows, inside)
        delta += grad_extra0 * extra0 + grad_extra1 * extra1
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + of_head + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + of_head + rows, delta, mask=inside)

    if grad_q_ptr is not None:
        q_ptr += first_row.to(tl.int64) * stride_qt + head * stride_qh
        k_ptr += first_key.to(tl.int64) * stride_kt + head // GROUP * stride_kh
        v_ptr += first_key.to(tl.int64) * stride_vt + head // GROUP * stride_vh
        q = tiles.load_rows(q_ptr, rows, stride_qt, num_rows, True, WIDTH, D)
        lse2 = tl.load(lse_ptr + of_head + rows, mask=inside, other=float("inf")) * tiles.LOG2_E
        start, end = tl.zeros_like(rows), tl.minimum(rows + shift + 1, num_keys)
        full = tl.maximum(tl.minimum(block * M + shift + 1, num_keys), 0) // N * N
        high = tl.minimum(block * M + M + shift, num_keys)
        grad_q = tl.zeros([M, D], tl.float32)
        grad_q = tiles.add_query_gradient(
            grad_q, q, grad_out, lse2, delta, grad_extra0, grad_extra1, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt,
            start, end, 0, full, num_keys, key_position, num_columns, scale2,
            False, grad_extra_ptr is not None, WIDTH, N, D,
        )  # fmt: skip
        grad_q = tiles.add_query_gradient(
            grad_q, q, grad_out, lse2, delta, grad_extra0, grad_extra1, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt,
            start, end, full, high, num_keys, key_position, num_columns, scale2,
            True, grad_extra_ptr is not None, WIDTH, N, D,
        )  # fmt: skip
        tiles.store_rows(grad_q_ptr + at_out, rows, stride_ot, num_rows, grad_q * scale, WIDTH, D)


@triton.jit(do_not_specialize=["total_rows", "total_keys", "num_columns", "stride_gh"])
def key_bwd_kernel(
    grad_out_ptr, grad_extra_ptr, q_ptr, k_ptr, v_ptr, column_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr,
    lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, grad_column_ptr, stride_gh, stride_qt, stride_qh, stride_kt,
    stride_kh, stride_vt, stride_vh, total_rows, total_keys, num_columns, scale2, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Those gradients of key, value and columns (by key and key head) whose pointers are not None."""
    block, kv_head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_row, num_rows, first_key, num_keys, shift, key_position = _sample(
        sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr
    )
    if block * N >= num_keys:
        return
    keys = block * N + tl.arange(0, N)
    kv_heads = tl.num_programs(1)
    k_ptr += first_key.to(tl.int64) * stride_kt + kv_head * stride_kh
    v_ptr += first_key.to(tl.int64) * stride_vt + kv_head * stride_vh
    k = tiles.load_rows(k_ptr, keys, stride_kt, num_keys, True, WIDTH, D)
    v = tiles.load_rows(v_ptr, keys, stride_vt, num_keys, True, WIDTH, D)
    column0, column1 = tiles.load_key_columns(column_ptr, keys, num_keys, key_position, num_columns)
    # Before this row none sees a key of the tile.
    low = tl.minimum(tl.maximum(block * N - shift, 0), num_rows) // M * M
    stride_ot = kv_heads * GROUP * WIDTH
    tile, line = tl.zeros([N, D], tl.float32), tl.zeros([N], tl.float32)
    state = tile, tile, line, line
    for member in range(GROUP):
        head = kv_head * GROUP + member
        of_head = head * total_rows + first_row
        own_q = q_ptr + first_row.to(tl.int64) * stride_qt + head * stride_qh
        own_grad_out = grad_out_ptr + first_row.to(tl.int64) * stride_ot + head * WIDTH
        own_grad_extra = grad_extra_ptr
        if grad_extra_ptr is not None:
            own_grad_extra = grad_extra_ptr + head * stride_gh + first_row.to(tl.int64) * 2
        state = tiles.add_key_gradients(
            state, keys, k, v, column0, column1, own_q, own_grad_out, lse_ptr + of_head, delta_ptr + of_head,
            own_grad_extra, None, None, stride_qt, stride_ot, low, num_rows, num_rows, shift, scale2,
            grad_extra_ptr is not None, WIDTH, M, D,
        )  # fmt: skip
    grad_k, grad_v, grad_column0, grad_column1 = state
    stride_gt = kv_heads * WIDTH
    at_key = first_key.to(tl.int64) * stride_gt + kv_head * WIDTH
    if grad_k_ptr is not None:
        tiles.store_rows(grad_k_ptr + at_key, keys, stride_gt, num_keys, grad_k * scale, WIDTH, D)
    if grad_v_ptr is not None:
        tiles.store_rows(grad_v_ptr + at_key, keys, stride_gt, num_keys, grad_v, WIDTH, D)
    if grad_column_ptr is not None:
        own = grad_column_ptr + (kv_head * total_keys + first_key) * 2
        tiles.store_pairs(own, keys, keys < num_keys, grad_column0, grad_column1)


@triton.jit(do_not_specialize=["num_samples", "total_keys", "num_columns"])
def column_bwd_kernel(
    partial_ptr, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr, grad_column_ptr, num_samples, total_keys,
    num_columns,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """[g, M, 2] by key head and key -> [P, 2] by position."""
    positions = tl.program_id(0) * P + tl.arange(0, P)
    heads = tl.arange(0, HEADS).to(tl.int64)
    sum0, sum1 = tl.zeros([P, HEADS], tl.float32), tl.zeros([P, HEADS], tl.float32)
    for sample in range(num_samples):
        _, _, first_key, num_keys, _, key_position = _sample(sample, cu_seqlens_q_ptr, cu_seqlens_kv_ptr, positions_ptr)
        keys = positions - key_position
        inside = ((keys >= 0) & (keys < num_keys))[:, None] & (heads < KV_HEADS)[None, :]
        first, second = tiles.load_pairs(partial_ptr, heads[None, :] * total_keys + (first_key + keys)[:, None], inside)
        sum0 += first
        sum1 += second
    tiles.store_pairs(grad_column_ptr, positions, positions < num_columns, tl.sum(sum0, 1), tl.sum(sum1, 1))
