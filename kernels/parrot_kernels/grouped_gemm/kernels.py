"""Triton kernels of `grouped_gemm`: persistent over ragged groups, with the epilogues of an expert MLP."""

from __future__ import annotations

import triton
import triton.language as tl

from parrot_kernels.grouped_gemm.tiles import (
    EVERY_ROW,
    PLANNED,
    add_product,
    eighths,
    group_bounds,
    halves,
    load_plane,
    load_ragged,
    load_tile,
    load_weights,
    plane_descriptor,
    ragged_descriptor,
    sigmoid,
    source_rows,
    tile_position,
)

# What becomes of the product of a tile.
STORE = tl.constexpr(0)  # y
SWIGLU = tl.constexpr(1)  # two products, gate and up: h and, unless z is None, z
SWIGLU_BWD = tl.constexpr(2)  # the gradient of h before its weight: gradient of z, weighted h, row sums for the weight


# The epilogues take pointers to the first row of the tile: offsets within a tile fit 32 bits, which saves registers.


@triton.jit
def _store_swiglu(gate, up, weight, cols, row_mask, z_ptr, h_ptr, width, BLOCK_M: tl.constexpr):
    mask = row_mask[:, None] & (cols < width)[None, :]
    at = tl.arange(0, BLOCK_M)[:, None] * width + cols[None, :]
    h = gate * sigmoid(gate) * up * weight[:, None]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        at += tl.arange(0, BLOCK_M)[:, None] * width
        tl.store(z_ptr + at, gate.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(z_ptr + width + at, up.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_swiglu_bwd(grad, weight, cols, row_mask, z_ptr, h_ptr, grad_z_ptr, width, BLOCK_M: tl.constexpr):
    """Writes weighted h and the gradient of z for some columns; returns the sum of grad * h over them for each row."""
    mask = row_mask[:, None] & (cols < width)[None, :]
    at = tl.arange(0, BLOCK_M)[:, None] * width + cols[None, :]
    z_at = at + tl.arange(0, BLOCK_M)[:, None] * width
    gate = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + width + z_at, mask=mask, other=0.0).to(tl.float32)
    sig = sigmoid(gate)
    silu = gate * sig
    total = tl.sum(grad * silu * up, 1)  # masked columns add nothing: their z is zero
    weight = weight[:, None]
    tl.store(h_ptr + at, (silu * up * weight).to(h_ptr.dtype.element_ty), mask=mask)
    grad *= weight
    grad_gate = grad * up * (sig + silu * (1.0 - sig))
    tl.store(grad_z_ptr + z_at, grad_gate.to(grad_z_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_z_ptr + width + z_at, (grad * silu).to(grad_z_ptr.dtype.element_ty), mask=mask)
    return total


@triton.jit(do_not_specialize=["rows", "x_rows"])
def m_grouped_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, offsets_ptr, plan_ptr, weights_ptr, out_ptr, z_ptr, grad_z_ptr, sums_ptr,
    rows, x_rows, num_groups, N, K, rows_per_segment, topk, weight_scale,
    SOURCE: tl.constexpr, EPILOGUE: tl.constexpr, TRANS_W: tl.constexpr, TMA: tl.constexpr, ROUTE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r] = epilogue(x[source(r)] @ w[group(r)]), one output tile after the other.

    w is [G, N, K] with TRANS_W, [G, K, N] without, and [2 * G, N, K] for SWIGLU. sums is [tiles along N, rows]. The
    weight of a segment is its own, or with ROUTE that of the segment of x that it comes from for its group: [S, G].
    Operands in float8 have scales, see `add_product`.
    """
    X_TMA: tl.constexpr = TMA and SOURCE != PLANNED
    PLANES: tl.constexpr = 2 if EPILOGUE == SWIGLU else 1
    x_desc = None
    w_desc = None
    if X_TMA:
        x_desc = plane_descriptor(x_ptr, 1, x_rows, K, BLOCK_M, BLOCK_K)
    if TMA:
        if TRANS_W:
            w_desc = plane_descriptor(w_ptr, num_groups * PLANES, N, K, BLOCK_N, BLOCK_K)
        else:
            w_desc = plane_descriptor(w_ptr, num_groups * PLANES, K, N, BLOCK_K, BLOCK_N)

    tiles_n = tl.cdiv(N, BLOCK_N)
    groups = tl.arange(0, BLOCK_G)
    los, his = group_bounds(groups, offsets_ptr, num_groups, rows, x_rows, rows_per_segment, SOURCE)
    counts = (tl.cdiv(his - los, BLOCK_M) * tiles_n).to(tl.int32)
    ends = tl.cumsum(counts, 0)
    for tile in range(tl.program_id(0), tl.sum(counts, 0), tl.num_programs(0)):
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(groups < group, counts, 0), 0)
        lo, hi = group_bounds(group, offsets_ptr, num_groups, rows, x_rows, rows_per_segment, SOURCE)
        tile_m, tile_n = tile_position(tile - before, tl.cdiv(hi - lo, BLOCK_M).to(tl.int32), tiles_n)
        row, n = lo + tile_m * BLOCK_M, tile_n * BLOCK_N
        own_rows = row + tl.arange(0, BLOCK_M)
        row_mask = tl.arange(0, BLOCK_M) < hi - row
        from_rows = source_rows(own_rows, lo, hi, plan_ptr, topk, rows_per_segment, SOURCE)
        x_row = (row - lo if SOURCE == EVERY_ROW else row).to(tl.int32)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if EPILOGUE == SWIGLU else None
        # Padding is a group without products.
        for step in range(0, tl.where(group < num_groups, tl.cdiv(K, BLOCK_K), 0)):
            k = step * BLOCK_K
            if X_TMA:
                a = load_plane(x_desc, 0, x_row, k, BLOCK_M, BLOCK_K)
            else:
                a = load_tile(x_ptr, from_rows, k + tl.arange(0, BLOCK_K), row_mask, K)
            plane = group * PLANES
            b = load_weights(w_ptr, w_desc, plane, n, k, N, K, TRANS_W, TMA, BLOCK_N, BLOCK_K)
            acc = add_product(acc, a, b, x_scale_ptr, from_rows, row_mask, w_scale_ptr, plane, n, k, N, K, BLOCK_N)
            if EPILOGUE == SWIGLU:
                plane += 1
                b = load_weights(w_ptr, w_desc, plane, n, k, N, K, TRANS_W, TMA, BLOCK_N, BLOCK_K)
                up = add_product(up, a, b, x_scale_ptr, from_rows, row_mask, w_scale_ptr, plane, n, k, N, K, BLOCK_N)

        cols = n + tl.arange(0, BLOCK_N)
        out = out_ptr + row * N
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if weights_ptr is not None:
            weighted = row_mask & (group < num_groups)
            at = from_rows // rows_per_segment * num_groups + group if ROUTE else own_rows // rows_per_segment
            weight = weight_scale * tl.load(weights_ptr + at, mask=weighted, other=0.0)
        if EPILOGUE == SWIGLU:
            z = z_ptr + 2 * row * N if z_ptr is not None else None
            _store_swiglu(acc, up, weight, cols, row_mask, z, out, N, BLOCK_M)
        elif EPILOGUE == SWIGLU_BWD:
            z, grad_z = z_ptr + 2 * row * N, grad_z_ptr + 2 * row * N
            # A part of the columns at a time: all of them would need more registers than there are.
            parts = eighths(acc, BLOCK_M, BLOCK_N) if BLOCK_N > 128 else halves(acc, BLOCK_M, BLOCK_N)
            total = tl.zeros((BLOCK_M,), tl.float32)
            WIDTH: tl.constexpr = parts[0].shape[1]
            for i in tl.static_range(len(parts)):
                part_cols = n + i * WIDTH + tl.arange(0, WIDTH)
                total += _store_swiglu_bwd(parts[i], weight, part_cols, row_mask, z, out, grad_z, N, BLOCK_M)
            tl.store(sums_ptr + tl.cast(tile_n, tl.int64) * rows + own_rows, total, mask=row_mask)
        else:
            mask = row_mask[:, None] & (cols < N)[None, :]
            at = tl.arange(0, BLOCK_M)[:, None] * N + cols[None, :]
            tl.store(out + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "x_rows"])
def k_grouped_kernel(
    a_ptr, b_ptr, offsets_ptr, plan_ptr, out_ptr,
    rows, x_rows, num_groups, N, K, rows_per_segment, topk,
    SOURCE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[g] [N, K] = a[rows of g].T @ b[source rows of g]; tiles of BLOCK_M x BLOCK_N, BLOCK_K rows a step."""
    B_TMA: tl.constexpr = TMA and SOURCE != PLANNED
    a_desc = None
    b_desc = None
    if TMA:
        a_desc = ragged_descriptor(a_ptr, N, BLOCK_K, BLOCK_M)
    if B_TMA:
        b_desc = ragged_descriptor(b_ptr, K, BLOCK_K, BLOCK_N)
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), num_groups * tiles_n * tiles_k, tl.num_programs(0)):
        group = tile // (tiles_n * tiles_k)
        tile_n, tile_k = tile_position(tile % (tiles_n * tiles_k), tiles_n, tiles_k)
        n, k = tile_n * BLOCK_M, tile_k * BLOCK_N
        ns, ks = n + tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_N)
        lo, hi = group_bounds(group, offsets_ptr, num_groups, rows, x_rows, rows_per_segment, SOURCE)
        base = lo if SOURCE == EVERY_ROW else tl.zeros_like(lo)  # row r of a meets row r - base of b
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        from_rows = source_rows(lo + tl.arange(0, BLOCK_K), lo, hi, plan_ptr, topk, rows_per_segment, SOURCE)
        for step in range(0, tl.cdiv(hi - lo, BLOCK_K).to(tl.int32)):
            row = lo + step * BLOCK_K
            own_rows = row + tl.arange(0, BLOCK_K)
            row_mask = own_rows < hi
            if TMA:
                a = load_ragged(a_desc, hi, row, n, BLOCK_K, BLOCK_M)
            else:
                a = load_tile(a_ptr, own_rows, ns, row_mask, N)
            if B_TMA:
                b = load_ragged(b_desc, hi - base, row - base, k, BLOCK_K, BLOCK_N)
            else:
                b = load_tile(b_ptr, from_rows, ks, row_mask, K)
                # Of the next step, so that no load of a tile waits for the plan: that would cost the pipeline stages.
                from_rows = source_rows(own_rows + BLOCK_K, lo, hi, plan_ptr, topk, rows_per_segment, SOURCE)
            acc = tl.dot(a.T, b, acc, input_precision="ieee")
        out = out_ptr + tl.cast(group, tl.int64) * N * K + ns.to(tl.int64)[:, None] * K + ks[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])
