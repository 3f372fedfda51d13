"""Operands in float8, by the kernels beside this."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.fp8_experts import kernels
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import cdiv

BLOCK = 128  # numbers that share a scale, in a row; of weights also rows
_ROWS = 32  # of one program

# R rows, K columns of a row; P planes of weights


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    width = x.shape[-1]
    rows, blocks = x.numel() // width, cdiv(width, BLOCK)
    q, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], blocks, dtype=torch.float32)
    if rows:
        launch(kernels.quantize_rows_kernel, (cdiv(rows, _ROWS), blocks))(
            x, q, scales, rows, width, ROWS=_ROWS, BLOCK=BLOCK
        )
    return q, scales


def quantize_weights(w: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    planes, rows, width = w.mT.shape if transposed else w.shape
    grid = cdiv(width, BLOCK), cdiv(rows, BLOCK), planes
    q = w.new_empty(planes, rows, width, dtype=torch.float8_e4m3fn)
    scales = w.new_empty(*reversed(grid), dtype=torch.float32)
    strides = (1, rows) if transposed else (width, 1)
    launch(kernels.quantize_weights_kernel, grid)(w, q, scales, rows, width, *strides, BLOCK=BLOCK)
    return q, scales


def quantized(x: Tensor, w: Tensor, *, trans_w: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Operands of x [..., K] @ w in float8, those of w as [..., N, K]; scales of both.

    w is [..., N, K] when `trans_w`, else [P, K, N].
    """
    x, x_scales = quantize_rows(x)
    q, w_scales = quantize_weights(w.flatten(0, -3), not trans_w)
    return x, q.view(w.shape) if trans_w else q, (x_scales, w_scales)
