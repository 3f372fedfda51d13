"""Triton `fp8_experts`: the kernels of `grouped_gemm` and `expert_mlp` with scales, after those that quantise.

A step of a product is 128 columns long, as a block is: the tensor cores add up one block, and its result times both
scales goes into the float32 sum.
"""

from __future__ import annotations

from torch import Tensor
from triton.runtime.driver import driver

from parrot_kernels import triton_support
from parrot_kernels.expert_mlp.triton_impl import FP8_PARTS
from parrot_kernels.fp8_experts.quantize import quantize_rows, quantize_weights
from parrot_kernels.fp8_experts.widths import why_not_widths
from parrot_kernels.grouped_gemm import triton_impl as grouped

__all__ = [
    "expert_mlp_dense_fwd",
    "expert_mlp_topk_fwd",
    "m_grouped_gemm",
    "m_grouped_swiglu",
    "quantize_rows",
    "quantize_weights",
    "why_not",
]


def why_not(*args: object) -> str | None:
    """Needs sm_90 or later (or the interpreter), and widths that are multiples of 16."""
    if reason := triton_support.why_not(*args):
        return reason
    if not triton_support.INTERPRETING and driver.active.get_current_target().arch < 90:
        return "it needs a device with float8 tensor cores and TMA, compute capability 9.0 or later"
    return why_not_widths(args)


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    return grouped.m_grouped_gemm(x, w, offsets, plan, topk, trans_w, True)


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    return grouped.m_grouped_swiglu(x, w_gate_up, offsets, plan, topk, weights, save_z, True)


expert_mlp_dense_fwd, expert_mlp_topk_fwd = FP8_PARTS.expert_mlp_dense_fwd, FP8_PARTS.expert_mlp_topk_fwd
