"""Triton `swiglu`: one pass over z; weight gradients as one partial sum a row, added up by segment afterwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.grouped_gemm.tiles import sigmoid
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import cdiv, next_power_of_2

# J segments, V rows a segment, I inner width


def why_not(*args: object) -> str | None:
    """Needs a CUDA device (or the interpreter) and at most 32 bits."""
    return triton_support.why_not(*args)


@triton.jit
def _swiglu_fwd_kernel(z_ptr, weights_ptr, h_ptr, rows_per_segment, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    gate = tl.load(z_ptr + 2 * row * width + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + (2 * row + 1) * width + cols, mask=mask, other=0.0).to(tl.float32)
    h = gate * sigmoid(gate) * up
    if weights_ptr is not None:
        h *= tl.load(weights_ptr + row // rows_per_segment)
    tl.store(h_ptr + row * width + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr, z_ptr, weights_ptr, grad_z_ptr, sums_ptr, rows_per_segment, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row // rows_per_segment)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        grad = tl.load(grad_ptr + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z_ptr + 2 * row * width + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + (2 * row + 1) * width + cols, mask=mask, other=0.0).to(tl.float32)
        sig = sigmoid(gate)
        silu = gate * sig
        total += grad * silu * up
        grad *= weight
        grad_gate = grad * up * (sig + silu * (1.0 - sig))
        tl.store(grad_z_ptr + 2 * row * width + cols, grad_gate.to(grad_z_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_z_ptr + (2 * row + 1) * width + cols, (grad * silu).to(grad_z_ptr.dtype.element_ty), mask=mask)
    if weights_ptr is not None:
        tl.store(sums_ptr + row, tl.sum(total, 0))


def _block(width: int) -> int:
    return min(next_power_of_2(max(width, 16)), 64 if triton_support.INTERPRETING else 2048)


def swiglu_fwd(z: Tensor, weights: Tensor | None) -> Tensor:
    """See the contract in the package docstring."""
    segments, rows, _, width = z.shape
    h = z.new_empty(segments, rows, width)
    if h.numel():
        block = _block(width)
        launch(_swiglu_fwd_kernel, (segments * rows, cdiv(width, block)))(z, weights, h, rows, width, BLOCK=block)
    return h


def swiglu_bwd(grad: Tensor, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    segments, rows, _, width = z.shape
    grad_z = torch.empty_like(z)
    sums = None if weights is None else weights.new_empty(segments, rows)
    if grad.numel():
        launch(_swiglu_bwd_kernel, (segments * rows,))(grad, z, weights, grad_z, sums, rows, width, BLOCK=_block(width))
    return grad_z, z.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(1)
