"""Triton kernels that quantise operands to float8: each number is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale(largest):
    """The scale of a block by its largest magnitude."""
    return tl.where(largest == 0.0, 1.0, tl.math.div_rn(largest, 448.0))


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of BLOCK columns of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    at = row[:, None] * width + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(x), 1))
    tl.store(q_ptr + at, tl.math.div_rn(x, scale[:, None] + tl.zeros_like(x)).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row * tl.num_programs(1) + block, scale, mask=row < rows)


@triton.jit
def quantize_weights_kernel(
    w_ptr, q_ptr, scale_ptr, rows, width, stride_n, stride_k, BLOCK: tl.constexpr
):  # fmt: skip
    """A square of BLOCK rows and columns of q [P, rows, width]; w has the strides of the same element."""
    plane, line, block = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    row, cols = line * BLOCK + tl.arange(0, BLOCK), block * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    first = plane * rows * width
    own = w_ptr + first + row.to(tl.int64)[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_k
    w = tl.load(own, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.max(tl.abs(w), 1), 0))
    at = first + row.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(q_ptr + at, tl.math.div_rn(w, scale + tl.zeros_like(w)).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + (plane * tl.num_programs(1) + line) * tl.num_programs(0) + block, scale)
