"""Triton `grouped_gemm`: tiles and launches of its persistent kernels, which read the groups' bounds on the device.

On sm_90 and later, operands of two bytes come by TMA; rows gathered through a plan come by asynchronous copies, one
pointer a row. Elsewhere, and for widths that are no multiple of 16 bytes, all of it goes through pointers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.fp8_experts.quantize import quantized
from parrot_kernels.grouped_gemm import product_tiles, tiles
from parrot_kernels.grouped_gemm.backward import Parts
from parrot_kernels.grouped_gemm.kernels import STORE, SWIGLU, SWIGLU_BWD, k_grouped_kernel, m_grouped_kernel
from parrot_kernels.grouped_gemm.tiles import EVERY_ROW, IN_PLACE, PLANNED
from parrot_kernels.launches import Launch, planned
from parrot_kernels.permute import triton_impl as permute
from parrot_kernels.swiglu import triton_impl as swiglu
from parrot_kernels.tile_choice import cdiv, next_power_of_2, product_tile

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width

_IN_PLACE, _EVERY_ROW, _PLANNED = IN_PLACE.value, EVERY_ROW.value, PLANNED.value


def why_not(*args: object) -> str | None:
    """Needs a CUDA device (or the interpreter) and at most 32 bits; any width."""
    return triton_support.why_not(*args)


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
    """Of `m_grouped_kernel`, for what `launch_m_grouped` finds out about its arguments."""
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
    return Launch(m_grouped_kernel, (programs,), tile, choices, numbers=numbers, constants=constants)


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
    by_tma: bool | None = None,
) -> None:
    """Runs `m_grouped_kernel`.

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
        by_tma: `tiles.tma_reads` of x and w, from callers that have asked.
    """
    out = outputs[0]
    columns, depth = out.shape[-1], x.shape[-1]
    rows, x_rows = out.numel() // columns, x.numel() // depth
    if not rows:
        return
    own = _m_launch(
        (rows, x_rows, w.shape[0], columns, depth), (rows_per_segment, topk), weight_scale,
        (_source(offsets, plan), epilogue, trans_w, route), x.element_size(),
        tiles.tma_reads(x, w) if by_tma is None else by_tma, triton_support.num_processors(x.device),
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
    """Of `k_grouped_kernel`, for what `launch_k_grouped` finds out about its arguments."""
    rows, _, num_groups, columns, depth = sizes
    kind = tiles.product_kind(element_size, by_tma, columns, depth)
    choices = _K_TILES[kind]
    tile, programs = product_tiles.k_tile(choices, rows, columns, depth, num_groups, element_size, processors)
    constants = {"SOURCE": source, "TMA": kind == "tma"}
    return Launch(k_grouped_kernel, (programs,), tile, choices, numbers=(*sizes, *segment), constants=constants)


def launch_k_grouped(
    a: Tensor, b: Tensor, out: Tensor, *, offsets: Tensor | None, plan: Tensor | None, topk: int, rows_per_segment: int
) -> None:
    """Runs `k_grouped_kernel`: out [G, N, K] from a [..., N] and b [..., K]; `offsets` and `plan` as above."""
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
    by_tma = tiles.tma_reads(grad, w)
    kind = tiles.product_kind(grad.element_size(), by_tma, width, grad.shape[-1])
    block = _M_TILES[SWIGLU_BWD.value][kind][0]["BLOCK_N"]
    sums = probs.new_empty(cdiv(width, block), segments, rows)
    launch_m_grouped(
        grad, w, (h, z, grad_z, sums), offsets=offsets, plan=plan, topk=topk, weights=probs,
        weight_scale=scale, route=True, rows_per_segment=rows, epilogue=SWIGLU_BWD.value, trans_w=True,
        by_tma=by_tma,
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
