"""How far products with operands in float8 may be from the formula, by the rule of `parrot_kernels.fp8_experts`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parrot_kernels.fp8_experts.reference import BLOCK, LARGEST, rounded_rows, rounded_weights
from parrot_kernels.testing import assert_accurate
from parrot_sys.ops import m_grouped_gemm, m_grouped_swiglu

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


Grouped = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
GROUPS = torch.tensor([0, 0, 0, 2, -1])


def grouped_inputs(rows: int, k: int, n: int, dtype: torch.dtype) -> Grouped:
    """x, gate and up, offsets, a plan of 5 of 6 positions and weights: 3 groups, of which one is empty; padding."""
    x, w = torch.randn(3, rows, k).to(dtype), (torch.randn(3, 2, n, k) / math.sqrt(k)).to(dtype)
    return x, w, torch.tensor([0, 3, 3, 4]), torch.tensor([0, 5, 2, 1, 4]), torch.rand(5)


def grouped_products(inputs: Grouped, stored: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Results of the ops; `stored` [5, V, N] is an h for the down-projection."""
    x, w, offsets, plan, weights = (tensor.to(device) for tensor in inputs)
    options: dict[str, Any] = {"plan": plan, "topk": 2, "fp8": True}
    return {
        "z": m_grouped_gemm(x, w.flatten(1, 2), offsets, **options),
        "h": m_grouped_swiglu(x, w, offsets, weights=weights, **options),
        # Matrices [K, N]: they are transposed while they are quantised.
        "y": m_grouped_gemm(stored.to(device), w[:, 0], offsets, trans_w=False, fp8=True),
    }


def assert_add_up(actual: dict[str, Tensor], inputs: Grouped, stored: Tensor) -> None:
    """`grouped_products` add up in float32 exactly what the quantised operands give."""
    x, w, _, plan, weights = inputs
    live = (GROUPS >= 0)[:, None, None]

    def plain(of: torch.dtype) -> dict[str, Tensor]:
        rows, down_rows = rounded_rows(x).to(of)[plan // 2], rounded_rows(stored).to(of)
        matrices, together = rounded_weights(w).to(of)[GROUPS], rounded_weights(w.flatten(1, 2)).to(of)[GROUPS]
        gate, up = torch.einsum("jvk,jsik->sjvi", rows, matrices)
        h = torch.nn.functional.silu(gate) * up * weights.to(of)[:, None, None]
        y = torch.einsum("jvi,jik->jvk", down_rows, matrices[:, 0])
        return {"z": torch.einsum("jvk,jik->jvi", rows, together) * live, "h": h * live, "y": y * live}

    exact, same_dtype = plain(torch.float64), plain(torch.float32)
    for name, value in actual.items():
        assert_accurate(name, value.cpu(), exact[name], same_dtype[name].to(x.dtype))
