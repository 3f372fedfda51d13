"""Triton `grouped_gemm`: persistent kernels over ragged groups, whose bounds are read on the device.

On sm_90 and later, operands of two bytes come by TMA; rows gathered through a plan come by asynchronous copies, one
pointer a row. Elsewhere, and for widths that are no multiple of 16 bytes, all of it goes through pointers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.fp8_experts.quantize import quantized
from parrot_kernels.grouped_gemm import product_tiles, tiles
from parrot_kernels.grouped_gemm.backward import Parts
from parrot_kernels.grouped_gemm.tiles import (
    EVERY_ROW,
    IN_PLACE,
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
from parrot_kernels.launches import Launch, planned
from parrot_kernels.permute import triton_impl as permute
from parrot_kernels.swiglu import triton_impl as swiglu
from parrot_kernels.tile_choice import cdiv, next_power_of_2, product_tile

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width

# What becomes of the product of a tile.
STORE = tl.constexpr(0)  # y
SWIGLU = tl.constexpr(1)  # two products, gate and up: h and, unless z is None, z
SWIGLU_BWD = tl.constexpr(2)  # the gradient of h before its weight: gradient of z, weighted h, row sums for the weight

_IN_PLACE, _EVERY_ROW, _PLANNED = IN_PLACE.value, EVERY_ROW.value, PLANNED.value


def why_not(*args: object) -> str | None:
    """Needs a CUDA device (or the interpreter) and at most 32 bits; any width."""
    return triton_support.why_not(*args)


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
def _m_grouped_kernel(
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
def _k_grouped_kernel(
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


_PLAIN = {
    "pointer": [product_tile(128, 128, 64, warps=8, stages=3), product_tile(64, 128, 64, warps=4, stages=4)],
    "unaligned": [product_tile(64, 64, 32, warps=8, stages=2)],
    "fp32": [product_tile(64, 64, 16, warps=8, stages=3)],
}
_FP8 = [product_tile(128, 128, 128, warps=8, stages=4)]
_TMA = [product_tile(128, 256, 64, warps=8, stages=3), product_tile(128, 128, 64, warps=8, stages=4)]
# For SwiGLU, which has two accumulators.
_PAIR_TMA = [product_tile(128, 128, 64, warps=8, stages=4), product_tile(64, 128, 64, warps=4, stages=4)]
_PAIR_FP8 = [product_tile(128, 64, 128, warps=8, stages=4)]
_PAIR_POINTER = [product_tile(128, 64, 64, warps=8, stages=3), product_tile(64, 64, 64, warps=4, stages=4)]
_M_TILES = {
    STORE.value: tiles.product_tiles({"tma": _TMA, "fp8": _FP8, **_PLAIN}),
    SWIGLU.value: tiles.product_tiles({**_PLAIN, "tma": _PAIR_TMA, "fp8": _PAIR_FP8, "pointer": _PAIR_POINTER}),
    # All of a kind have the same BLOCK_N: `sums` has one row for each tile along N.
    SWIGLU_BWD.value: tiles.product_tiles({"tma": _TMA[:1], **_PLAIN}),
}
_K_TILES = tiles.product_tiles({"tma": _TMA, **_PLAIN})


@planned
def _m_launch(
    sizes: tuple[int, int, int, int, int],
    segment: tuple[int, int],
    weight_scale: float,
    form: tuple[int, int, bool, bool],
    element_size: int,
    by_tma: bool,
    processors: int,
) -> Launch:
    """Of `_m_grouped_kernel`, for what `launch_m_grouped` finds out about its arguments."""
    rows, _, num_groups, columns, depth = sizes
    source, epilogue, trans_w, route = form
    kind = tiles.product_kind(element_size, by_tma, columns, depth)
    choices, results = _M_TILES[epilogue][kind], 2 if epilogue == SWIGLU.value else 1
    rows_per_segment = None if source == EVERY_ROW.value else segment[0]
    tile, programs = product_tiles.m_tile(
        choices, rows, columns, depth, num_groups, rows_per_segment, element_size, results, processors
    )  # fmt: skip
    constants = {
        "SOURCE": source, "EPILOGUE": epilogue, "TRANS_W": trans_w, "TMA": kind in ("tma", "fp8"), "ROUTE": route,
        "BLOCK_G": next_power_of_2(num_groups + 1),
    }  # fmt: skip
    numbers = (*sizes, *segment, weight_scale)
    return Launch(_m_grouped_kernel, (programs,), tile, choices, numbers=numbers, constants=constants)


def launch_m_grouped(
    x: Tensor,
    w: Tensor,
    outputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    *,
    offsets: Tensor | None,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    weight_scale: float = 1.0,
    route: bool = False,
    rows_per_segment: int,
    epilogue: int,
    trans_w: bool,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Runs `_m_grouped_kernel`.

    Args:
        x: [..., K].
        w: [G, N, K], [G, K, N] (not `trans_w`) or [G, 2, N, K] (SWIGLU).
        outputs: out [..., N], z, grad_z and sums of the kernel.
        offsets: None: each group takes every row of x.
        plan: None: rows are in place.
        topk: divisor of `plan`.
        weights: [J] float32, of each segment of x and group [S, G] with `route`, or None.
        weight_scale: factor of `weights`.
        route: see `weights`.
        rows_per_segment: V.
        epilogue: STORE, SWIGLU or SWIGLU_BWD.
        trans_w: layout of w.
        scales: of x and w where they are float8.
    """
    out = outputs[0]
    columns, depth = out.shape[-1], x.shape[-1]
    rows, x_rows = out.numel() // columns, x.numel() // depth
    if not rows:
        return
    own = _m_launch(
        (rows, x_rows, w.shape[0], columns, depth), (rows_per_segment, topk), weight_scale,
        (_source(offsets, plan), epilogue, trans_w, route), x.element_size(), tiles.tma_reads(x, w),
        triton_support.num_processors(x.device),
    )  # fmt: skip
    own(x, w, *scales, offsets, plan, weights, *outputs)


def _source(offsets: Tensor | None, plan: Tensor | None) -> int:
    return _EVERY_ROW if offsets is None else _IN_PLACE if plan is None else _PLANNED


@planned
def _k_launch(
    sizes: tuple[int, int, int, int, int],
    segment: tuple[int, int],
    source: int,
    element_size: int,
    by_tma: bool,
    processors: int,
) -> Launch:
    """Of `_k_grouped_kernel`, for what `launch_k_grouped` finds out about its arguments."""
    rows, _, num_groups, columns, depth = sizes
    kind = tiles.product_kind(element_size, by_tma, columns, depth)
    choices = _K_TILES[kind]
    tile, programs = product_tiles.k_tile(choices, rows, columns, depth, num_groups, element_size, processors)
    constants = {"SOURCE": source, "TMA": kind == "tma"}
    return Launch(_k_grouped_kernel, (programs,), tile, choices, numbers=(*sizes, *segment), constants=constants)


def launch_k_grouped(
    a: Tensor, b: Tensor, out: Tensor, *, offsets: Tensor | None, plan: Tensor | None, topk: int, rows_per_segment: int
) -> None:
    """Runs `_k_grouped_kernel`: out [G, N, K] from a [..., N] and b [..., K]; `offsets` and `plan` as above."""
    num_groups, columns, depth = out.shape
    sizes = a.numel() // columns, b.numel() // depth, num_groups, columns, depth
    own = _k_launch(
        sizes, (rows_per_segment, topk), _source(offsets, plan), a.element_size(), tiles.tma_reads(a, b),
        triton_support.num_processors(a.device),
    )  # fmt: skip
    own(a, b, offsets, plan, out)


def swiglu_bwd_of_product(
    grad: Tensor,
    w: Tensor,
    z: Tensor,
    *,
    offsets: Tensor | None,
    plan: Tensor | None,
    topk: int,
    probs: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of `weights * swiglu(z)` whose incoming gradient is a product: grad [S, V, H] @ w [G, I, H].T.

    The weights are scale * probs [S, G].

    Returns:
        weights * swiglu(z) [J, V, I], the gradient of z [J, V, 2, I], and sums [B, J, V] float32, which make the
        gradient of the weights: over B and V.
    """
    segments, rows, _, width = z.shape
    h, grad_z = z.new_empty(segments, rows, width), torch.empty_like(z)
    kind = tiles.product_kind(grad.element_size(), tiles.tma_reads(grad, w), width, grad.shape[-1])
    block = _M_TILES[SWIGLU_BWD.value][kind][0]["BLOCK_N"]
    sums = probs.new_empty(cdiv(width, block), segments, rows)
    launch_m_grouped(
        grad, w, (h, z, grad_z, sums), offsets=offsets, plan=plan, topk=topk, weights=probs,
        weight_scale=scale, route=True, rows_per_segment=rows, epilogue=SWIGLU_BWD.value, trans_w=True,
    )  # fmt: skip
    return h, grad_z, sums


def m_grouped_gemm(
    x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool, fp8: bool = False
) -> Tensor:
    """See the contract in the package docstring; `fp8` is that of `fp8_experts`."""
    segments, rows_per_segment = len(x) if plan is None else len(plan), x.shape[1]
    y = x.new_empty(segments, rows_per_segment, w.shape[1] if trans_w else w.shape[2])
    x, w, scales = quantized(x, w, trans_w=trans_w) if fp8 else (x, w, (None, None))
    launch_m_grouped(
        x, w, (y, None, None, None), offsets=offsets, plan=plan, topk=topk, weights=None,
        rows_per_segment=rows_per_segment, epilogue=STORE.value, trans_w=trans_w or fp8, scales=scales,
    )  # fmt: skip
    return y


def m_grouped_swiglu(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    save_z: bool,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring; `fp8` is that of `fp8_experts`."""
    segments, rows_per_segment, width = len(x) if plan is None else len(plan), x.shape[1], w_gate_up.shape[2]
    h, empty = x.new_empty(segments, rows_per_segment, width), x.new_empty(0)
    z = x.new_empty(segments, rows_per_segment, 2, width) if save_z else None
    x, w_gate_up, scales = quantized(x, w_gate_up, trans_w=True) if fp8 else (x, w_gate_up, (None, None))
    launch_m_grouped(
        x, w_gate_up, (h, z, None, None), offsets=offsets, plan=plan, topk=topk, weights=weights,
        rows_per_segment=rows_per_segment, epilogue=SWIGLU.value, trans_w=True, scales=scales,
    )  # fmt: skip
    return h, empty if z is None else z


def k_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    """See the contract in the package docstring."""
    out = a.new_empty(offsets.shape[0] - 1, a.shape[-1], b.shape[-1])
    launch_k_grouped(a, b, out, offsets=offsets, plan=plan, topk=topk, rows_per_segment=a.shape[1])
    return out


_PARTS = Parts(
    m_grouped_gemm=m_grouped_gemm,
    k_grouped_gemm=k_grouped_gemm,
    swiglu_bwd=swiglu.swiglu_bwd,
    unpermute_fwd=permute.unpermute_fwd,
)
m_grouped_gemm_bwd, m_grouped_swiglu_bwd = _PARTS.m_grouped_gemm_bwd, _PARTS.m_grouped_swiglu_bwd
