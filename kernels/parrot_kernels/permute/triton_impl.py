"""Triton `permute` and `unpermute`: each row is moved once, sums over k in registers; rows stay in their own order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import cdiv, next_power_of_2

# T rows, K topk, R places in the plan, W columns

Needs = tuple[bool, bool]


def why_not(*args: object) -> str | None:
    """Needs a CUDA device (or the interpreter) and at most 32 bits."""
    return triton_support.why_not(*args)


@triton.jit
def _permute_kernel(x_ptr, probs_ptr, plan_ptr, rows_ptr, row_probs_ptr, width, topk, BLOCK_W: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    position = tl.load(plan_ptr + place).to(tl.int64)
    if probs_ptr is not None and tl.program_id(1) == 0:
        tl.store(row_probs_ptr + place, tl.load(probs_ptr + position))
    cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    values = tl.load(x_ptr + position // topk * width + cols, mask=cols < width)
    tl.store(rows_ptr + place * width + cols, values, mask=cols < width)


@triton.jit
def _unpermute_kernel(
    rows_ptr, probs_ptr, places_ptr, residual_ptr, y_ptr, residual_scale, width, topk, BLOCK_W: tl.constexpr
):
    """y = residual_scale * residual + sum over k of probs * rows; place -1 stands for a dropped position."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = cols < width
    total = tl.zeros((BLOCK_W,), tl.float32)
    if residual_ptr is not None:
        total = residual_scale * tl.load(residual_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    for k in range(0, topk):
        place = tl.load(places_ptr + row * topk + k)
        values = tl.load(rows_ptr + place * width + cols, mask=mask & (place >= 0), other=0.0).to(tl.float32)
        if probs_ptr is not None:
            # (Zero times what was dropped: the weight may be anything.)
            values *= tl.load(probs_ptr + row * topk + k, mask=place >= 0, other=0.0)
        total += values
    tl.store(y_ptr + row * width + cols, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unpermute_bwd_kernel(
    grad_ptr, rows_ptr, probs_ptr, places_ptr, grad_rows_ptr, grad_probs_ptr,
    width, topk, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row t: its gradient is read once and goes, weighted, to its K places; grad_probs by dot products."""
    row = tl.program_id(0).to(tl.int64)
    choices = tl.arange(0, BLOCK_K)
    dots = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, width, BLOCK_W):
        cols = start + tl.arange(0, BLOCK_W)
        mask = cols < width
        grad = tl.load(grad_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        for k in range(0, topk):
            place = tl.load(places_ptr + row * topk + k)
            kept = mask & (place >= 0)
            if grad_probs_ptr is not None:
                values = tl.load(rows_ptr + place * width + cols, mask=kept, other=0.0).to(tl.float32)
                dots += tl.where(choices == k, tl.sum(grad * values, 0), 0.0)
            if grad_rows_ptr is not None:
                weight = 1.0 if probs_ptr is None else tl.load(probs_ptr + row * topk + k)
                out = (grad * weight).to(grad_rows_ptr.dtype.element_ty)
                tl.store(grad_rows_ptr + place * width + cols, out, mask=kept)
    if grad_probs_ptr is not None:
        tl.store(grad_probs_ptr + row * topk + choices, dots, mask=choices < topk)


def _block(width: int, most: int = 4096) -> int:
    """Columns that one program moves at a time."""
    return min(next_power_of_2(max(width, 16)), 64 if triton_support.INTERPRETING else most)


def places_of(plan: Tensor, positions: int) -> Tensor:
    """The inverse of the plan: [positions] int64, the place of each position, -1 where it was dropped."""
    places = plan.new_full((positions,), -1, dtype=torch.int64)
    return places.scatter_(0, plan, torch.arange(len(plan), device=plan.device))


def combine_rows(
    rows: Tensor, probs: Tensor | None, places: Tensor, topk: int, y: Tensor, residual: Tensor | None, scale: float
) -> None:
    """y [T, W] = scale * residual [T, W] + the weighted sums of rows [R, W]; `places` as from `places_of`."""
    num_rows, width = y.shape
    if not y.numel():
        return
    block = _block(width)
    grid = (num_rows, cdiv(width, block))
    launch(_unpermute_kernel, grid)(rows, probs, places, residual, y, scale, width, topk, BLOCK_W=block, num_warps=8)


def permute_fwd(x: Tensor, probs: Tensor | None, plan: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    width, places = x.shape[1], len(plan)
    rows = x.new_empty(places, width)
    row_probs = x.new_empty(0 if probs is None else places, dtype=torch.float32)
    if places:
        block = _block(width)
        grid = (places, max(cdiv(width, block), 1))
        launch(_permute_kernel, grid)(x, probs, plan, rows, row_probs, width, topk, BLOCK_W=block, num_warps=8)
    return rows, row_probs


def permute_bwd(
    grad_rows: Tensor | None, grad_row_probs: Tensor | None, plan: Tensor, topk: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    grad_x, grad_probs = (plan.new_empty(0, dtype=torch.float32) for _ in range(2))
    if grad_rows is not None:
        grad_x = unpermute_fwd(grad_rows, None, plan, topk, num_rows)
    if grad_row_probs is not None:
        grad_probs = grad_row_probs.new_zeros(num_rows * topk).scatter_(0, plan, grad_row_probs)
        grad_probs = grad_probs.view(num_rows, topk)
    return grad_x, grad_probs


def unpermute_fwd(rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, num_rows: int) -> Tensor:
    """See the contract in the package docstring."""
    y = rows.new_empty(num_rows, rows.shape[1])
    combine_rows(rows, probs, places_of(plan, num_rows * topk), topk, y, None, 0.0)
    return y


def unpermute_bwd(
    grad: Tensor, rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, needs: Needs
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, width = grad.shape
    needs_rows, needs_probs = needs[0], needs[1] and probs is not None
    grad_rows = torch.empty_like(rows) if needs_rows else None
    grad_probs = rows.new_empty(num_rows, topk, dtype=torch.float32) if needs_probs else None
    if num_rows and (needs_rows or needs_probs):
        launch(_unpermute_bwd_kernel, (num_rows,))(
            grad, rows, probs, places_of(plan, num_rows * topk), grad_rows, grad_probs, width, topk,
            BLOCK_K=next_power_of_2(topk), BLOCK_W=_block(width, 2048), num_warps=8,
        )  # fmt: skip
    return (
        rows.new_empty(0) if grad_rows is None else grad_rows,
        rows.new_empty(0, dtype=torch.float32) if grad_probs is None else grad_probs,
    )
