"""How far products with operands in float8 may be from the formula, by the rule of `parrot_kernels.fp8_experts`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parrot_kernels.fp8_experts.reference import BLOCK, LARGEST

SILU_SLOPE = 1.0999  # the largest


def rounding(values: Tensor, scales: Tensor) -> Tensor:
    """How far an element of float8 may be from its value: half of its last place, normal or not."""
    return values.abs() / 16 + scales / 1024


def row_scales(values: Tensor) -> Tensor:
    """The largest of each row's blocks over 448, for each element."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return (padded.amax(-1) / LARGEST).repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]


def weight_scales(w: Tensor) -> Tensor:
    """The same of the squares of [..., N, K]."""
    lines = row_scales(w.mT).mT * LARGEST
    return row_scales(lines)


def product_bound(x: Tensor, w: Tensor, error_of_x: Tensor | None = None) -> Tensor:
    """Of x [..., K] @ w [N, K].T, all float64: what the rounding of both can change, and float32 sums."""
    dx = rounding(x, row_scales(x)) if error_of_x is None else error_of_x
    dw = rounding(w, weight_scales(w))
    return (dx @ w.mT.abs() + x.abs() @ dw.mT + dx @ dw.mT) + x.abs() @ w.mT.abs() * x.shape[-1] * 2**-23


def assert_within_bound(
    y: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, probs: Tensor, *, residual_scale: float, output_scale: float
) -> None:
    """Each element of the experts' output `y`, in bfloat16, is as near to float64 as the bound says.

    Args:
        y: [n, V, H].
        x: [n, V, H] float64, as what follows.
        gate_up: [E, 2, I, H].
        down: [E, I, H].
        probs: [n, E], zeros where an expert does not run.
        residual_scale: factor of `x`.
        output_scale: factor of the experts.
    """
    exact, bound = residual_scale * x, torch.zeros_like(x)
    for e in range(len(down)):
        p = probs[:, e].double()[:, None, None] * output_scale
        gate, up = x @ gate_up[e, 0].T, x @ gate_up[e, 1].T
        gate_error, up_error = product_bound(x, gate_up[e, 0]), product_bound(x, gate_up[e, 1])
        silu = torch.nn.functional.silu(gate)
        h = silu * up * p
        error = p * (SILU_SLOPE * gate_error * (up.abs() + up_error) + silu.abs() * up_error)
        error = error + 2**-8 * (h.abs() + error)  # h is stored in bfloat16
        largest = h.abs() + error
        error = error + rounding(largest, row_scales(largest))
        exact = exact + h @ down[e]
        bound = bound + product_bound(h, down[e].T, error)
    bound = bound + 2**-8 * (exact.abs() + bound)
    difference = (y.double() - exact).abs()
    assert bool((difference <= bound).all()), float((difference / bound).max())
    # Errors of a product that are independent have a mean square of at most 2/3 of 2^-8 of its own (both operands are
    # evenly off by up to 2^-4), and three products stand one after or beside the other: gate, up, down.
    root_mean_square = float(difference.square().mean().sqrt() / (exact - residual_scale * x).square().mean().sqrt())
    assert 2**-6 < root_mean_square < math.sqrt(3 * 2 / 3) / 16, "of float8, and no worse than that"
