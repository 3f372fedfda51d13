"""Triton `expert_mlp`: three kernels serve both forms, since dense is top-k with every (expert, image) segment chosen.

    up-projection    `grouped_gemm`: gate and up products, SwiGLU and weight in the epilogue; rows of x in place or
                     through the plan, the product's rows sorted by expert
    down-projection  `_combine_kernel`: one product over K * I for the rows of an image, whose operands change at the
                     edges between experts, with the residual in its epilogue. Nothing H-wide is stored per expert.
    backward         the gradient of h with SwiGLU's backward pass in its epilogue, then the down-projection's kernel
                     for x and `k_grouped_gemm` for the weights
Images of few rows would leave the tiles of `_combine_kernel` mostly empty; their top-k form writes [n * K, V, H] by a
grouped product and adds up.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.expert_mlp.launchers import Grads, Needs, Parts
from parrot_kernels.expert_mlp.route import Route
from parrot_kernels.fp8_experts.quantize import quantized
from parrot_kernels.grouped_gemm import kernels, product_tiles, tiles
from parrot_kernels.grouped_gemm import triton_impl as grouped
from parrot_kernels.grouped_gemm.tiles import (
    add_product,
    load_plane,
    load_tile,
    load_weights,
    plane_descriptor,
    tile_position,
)
from parrot_kernels.launches import Launch, planned
from parrot_kernels.permute.triton_impl import combine_rows
from parrot_kernels.tile_choice import product_tile

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk,
# J segments: at most n * K, or E * n (dense)

# Images with fewer rows go by way of [n * K, V, H] in the top-k form.
COMBINE_ROWS = 64


def why_not(*args: object) -> str | None:
    """Needs a CUDA device (or the interpreter) and at most 32 bits; any width."""
    return triton_support.why_not(*args)


@triton.jit
def _segment_of(places_ptr, experts_ptr, image, choice, topk):
    """Where a choice of an image lies in `a`, and its matrix in w."""
    if places_ptr is None:
        place, expert = choice, choice
    else:
        place = tl.load(places_ptr + image * topk + choice).to(tl.int32)
        expert = tl.load(experts_ptr + image * topk + choice).to(tl.int32)
    return place, expert


# Not even a row count that 16 divides may be a kernel of its own: numbers of images change from step to step.
@triton.jit(do_not_specialize=["images", "rows_per_image", "segments"])
def _combine_kernel(
    a_ptr, w_ptr, a_scale_ptr, w_scale_ptr, places_ptr, experts_ptr, residual_ptr, y_ptr,
    residual_scale, images, rows_per_image, segments, topk, num_experts, N, K,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[i] = residual_scale * residual[i] + sum over k of a[place(i, k)] @ w[expert(i, k)].

    a [segments, V, K], w [E, K, N], residual and y [images, V, N]. Without `places` (dense) place and expert are k.
    Place -1 adds nothing. Operands in float8 have scales (`add_product`), and w is [E, N, K] then.
    """
    TRANS_W: tl.constexpr = w_scale_ptr is not None
    a_desc = None
    w_desc = None
    if TMA:
        a_desc = plane_descriptor(a_ptr, segments, rows_per_image, K, BLOCK_M, BLOCK_K)
        if TRANS_W:
            w_desc = plane_descriptor(w_ptr, num_experts, N, K, BLOCK_N, BLOCK_K)
        else:
            w_desc = plane_descriptor(w_ptr, num_experts, K, N, BLOCK_K, BLOCK_N)
    tiles_v, tiles_n, steps = tl.cdiv(rows_per_image, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    for tile in range(tl.program_id(0), images * tiles_v * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, images * tiles_v, tiles_n)
        image, v, n = tile_m // tiles_v, tile_m % tiles_v * BLOCK_M, tile_n * BLOCK_N
        own = v + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        place, expert = _segment_of(places_ptr, experts_ptr, image, 0, topk)
        for step in range(0, topk * steps):
            k = step % steps * BLOCK_K
            # Past the edge of an expert's K columns, of an image's rows, and at place -1, both ways to load give zeros.
            rows, row_mask = tl.cast(place, tl.int64) * rows_per_image + own, (own < rows_per_image) & (place >= 0)
            if TMA:
                a = load_plane(a_desc, place, v, k, BLOCK_M, BLOCK_K)
            else:
                a = load_tile(a_ptr, rows, k + tl.arange(0, BLOCK_K), row_mask, K)
            b = load_weights(w_ptr, w_desc, expert, n, k, N, K, TRANS_W, TMA, BLOCK_N, BLOCK_K)
            acc = add_product(acc, a, b, a_scale_ptr, rows, row_mask, w_scale_ptr, expert, n, k, N, K, BLOCK_N)
            # Those of the next step, so that no load of a tile waits for them: that would cost the pipeline a stage.
            place, expert = _segment_of(places_ptr, experts_ptr, image, tl.minimum((step + 1) // steps, topk - 1), topk)
        cols = n + tl.arange(0, BLOCK_N)
        mask = (own < rows_per_image)[:, None] & (cols < N)[None, :]
        at = (tl.cast(image, tl.int64) * rows_per_image + own)[:, None] * N + cols[None, :]
        acc += residual_scale * tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


_TILES = tiles.product_tiles(
    {
        "tma": [product_tile(128, 256, 64, warps=8, stages=3), product_tile(128, 128, 64, warps=8, stages=4)],
        "pointer": [product_tile(128, 128, 64, warps=8, stages=3), product_tile(64, 128, 64, warps=4, stages=4)],
        "unaligned": [product_tile(64, 64, 32, warps=8, stages=2)],
        "fp32": [product_tile(64, 64, 16, warps=8, stages=3)],
        "fp8": [product_tile(128, 128, 128, warps=8, stages=4)],
    }
)


@planned
def _combine_launch(
    sizes: tuple[int, ...], residual_scale: float, element_size: int, by_tma: bool, processors: int
) -> Launch:
    """Of `_combine_kernel`; `sizes` are its numbers from `images` on."""
    images, rows, _, topk, _, columns, depth = sizes
    kind = tiles.product_kind(element_size, by_tma, columns, depth)
    tile, programs = product_tiles.combine_tile(
        _TILES[kind], images, rows, columns, topk * depth, element_size, processors
    )  # fmt: skip
    numbers, constants = (residual_scale, *sizes), {"TMA": kind in ("tma", "fp8")}
    return Launch(_combine_kernel, (programs,), tile, _TILES[kind], numbers=numbers, constants=constants)


def _up(x: Tensor, w_gate_up: Tensor, route: Route, save_z: bool, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Weighted h [J, V, I], and z [J, V, 2, I] or None."""
    segments = route.probs.numel() if route.plan is None else route.plan.shape[0]
    rows = (segments, x.shape[1])
    width = w_gate_up.shape[2]
    h = x.new_empty(*rows, width)
    z = x.new_empty(*rows, 2, width) if save_z else None
    x, w_gate_up, scales = quantized(x, w_gate_up, trans_w=True) if fp8 else (x, w_gate_up, (None, None))
    grouped.launch_m_grouped(
        x, w_gate_up, (h, z, None, None), offsets=route.offsets, plan=route.plan, topk=route.topk,
        weights=route.probs, weight_scale=route.scale, route=True, rows_per_segment=x.shape[1],
        epilogue=kernels.SWIGLU.value, trans_w=True, scales=scales,
    )  # fmt: skip
    return h, z


def _combine_experts(
    a: Tensor, w: Tensor, route: Route, residual: Tensor, residual_scale: float, fp8: bool = False
) -> Tensor:
    """residual_scale * residual [n, V, N] + the sum of a [J, V, K] @ w [E, K, N] over the segments of each image."""
    y = torch.empty_like(residual)
    images, rows = residual.shape[:2]
    if not residual.numel():
        return y
    if route.offsets is None:  # all rows have the same experts, as if they were one image
        images, rows = 1, images * rows
    elif rows < COMBINE_ROWS:
        assert route.places is not None, "a route with offsets has places"
        each = grouped.m_grouped_gemm(a, w, route.offsets, None, 1, False, fp8)
        combine_rows(each.flatten(1), None, route.places, route.topk, y.flatten(1), residual.flatten(1), residual_scale)
        return y
    experts, depth, columns = w.shape
    a, w, scales = quantized(a, w, trans_w=False) if fp8 else (a, w, (None, None))
    sizes = images, rows, a.numel() // (rows * depth), route.topk, experts, columns, depth
    processors = triton_support.num_processors(a.device)
    own = _combine_launch(sizes, residual_scale, a.element_size(), tiles.tma_reads(a, w), processors)
    own(a, w, *scales, route.places, route.experts, residual, y)
    return y


def _fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    route: Route,
    residual_scale: float,
    save_z: bool,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    """y, and z [J, V, 2, I] or an empty tensor; with `fp8` both products take float8 operands (`fp8_experts`)."""
    h, z = _up(x, w_gate_up, route, save_z, fp8)
    return _combine_experts(h, w_down, route, x, residual_scale, fp8), x.new_empty(0) if z is None else z


def _bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    route: Route,
    z: Tensor,
    residual_scale: float,
    needs: Needs,
) -> Grads:
    """The first three gradients, and the sums that make that of probs; `z` as `_fwd` returned it."""
    needs_x, needs_gate_up, needs_down, _ = needs
    # By the kernel of the forward pass, so that the gradients are the same to the last bit.
    own_z = z if z.dim() > 1 else _up(x, w_gate_up, route, True, False)[1]
    assert own_z is not None, "save_z was set"
    weighted_h, grad_z, sums = grouped.swiglu_bwd_of_product(
        grad,
        w_down,
        own_z,
        offsets=route.offsets,
        plan=route.plan,
        topk=route.topk,
        probs=route.probs,
        scale=route.scale,
    )
    grad_z = grad_z.flatten(2)
    w = w_gate_up.flatten(1, 2)
    grad_x = _combine_experts(grad_z, w, route, grad, residual_scale) if needs_x else x.new_empty(0)
    grads = []
    for needed, a, b, weight in ((needs_gate_up, grad_z, x, w_gate_up), (needs_down, weighted_h, grad, w_down)):
        out = torch.empty_like(weight) if needed else x.new_empty(0)
        if needed:
            grouped.launch_k_grouped(
                a, b, out if out.dim() == 3 else out.flatten(1, 2), offsets=route.offsets, plan=route.plan,
                topk=route.topk, rows_per_segment=x.shape[1],
            )  # fmt: skip
        grads.append(out)
    return grad_x, grads[0], grads[1], sums


_PARTS = Parts(forward=_fwd, backward=_bwd, weighted=False)
expert_mlp_dense_fwd, expert_mlp_dense_bwd = _PARTS.expert_mlp_dense_fwd, _PARTS.expert_mlp_dense_bwd
expert_mlp_topk_fwd, expert_mlp_topk_bwd = _PARTS.expert_mlp_topk_fwd, _PARTS.expert_mlp_topk_bwd
# Of `fp8_experts`, whose backward pass is this op's.
FP8_PARTS = Parts(forward=functools.partial(_fwd, fp8=True), backward=_bwd, weighted=False)
