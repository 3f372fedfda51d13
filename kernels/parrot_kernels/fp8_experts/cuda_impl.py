"""CUDA `fp8_experts` for Hopper: the kernels of `grouped_gemm` and `expert_mlp` with operands in float8 (csrc/cuda).

Operands are quantised by the Triton kernels of `quantize.py`, and gradients are those of `expert_mlp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.expert_mlp import cuda_impl as experts
from parrot_kernels.expert_mlp.launchers import Parts
from parrot_kernels.expert_mlp.route import Route
from parrot_kernels.fp8_experts.widths import why_not_widths
from parrot_kernels.grouped_gemm import cuda_impl as grouped
from parrot_kernels.semaphores import semaphores


def why_not(*args: object) -> str | None:
    """Needs what the back ends of `expert_mlp` and `grouped_gemm` do, and widths that are multiples of 16."""
    is_route = len(args) > 3 and isinstance(args[3], Tensor) and args[3].dim() == 2
    reason = experts.why_not(*args) if is_route else grouped.why_not(*args)
    if reason:
        return reason
    return why_not_widths(args)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    from parrot_kernels.fp8_experts import quantize  # this module has to import without Triton, to say what it lacks

    return quantize.quantize_rows(x)


def quantize_weights(w: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    from parrot_kernels.fp8_experts import quantize

    return quantize.quantize_weights(w, transposed)


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    segments = x.shape[0] if plan is None else plan.shape[0]
    y = x.new_empty(segments, x.shape[1], w.shape[1] if trans_w else w.shape[2])
    if not w.shape[0]:
        return y.zero_()
    operands = *quantize_rows(x), *quantize_weights(w, not trans_w)
    torch.ops.parrot_ext.m_grouped_gemm_fp8_cuda(*operands, offsets, plan, topk, y)
    return y


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    return _swiglu(x, w_gate_up, offsets, plan, topk, weights, save_z)


def _swiglu(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor | None,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """As `m_grouped_swiglu`; without offsets each group takes all rows."""
    groups, _, width, _ = w_gate_up.shape
    sources, rows, _ = x.shape
    segments = groups * sources if offsets is None else sources if plan is None else plan.shape[0]
    h = x.new_empty(segments, rows, width)
    z = x.new_empty(segments, rows, 2, width) if save_z else None
    if groups:
        q, w_scales = quantize_weights(w_gate_up.flatten(0, 1), False)
        operands = *quantize_rows(x), q.view(w_gate_up.shape), w_scales
        torch.ops.parrot_ext.m_grouped_swiglu_fp8_cuda(*operands, offsets, plan, topk, weights, h, z)
    else:
        h.zero_()
        z = None if z is None else z.zero_()
    return h, x.new_empty(0) if z is None else z


def _fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, route: Route, residual_scale: float, save_z: bool
) -> tuple[Tensor, Tensor]:
    """y, and z [J, V, 2, I] or an empty tensor."""
    h, z = _swiglu(x, w_gate_up, route.offsets, route.plan, route.topk, route.weights, save_z)
    if not h.shape[0]:  # no image has an expert
        return x * residual_scale, z
    operands = *quantize_rows(h), *quantize_weights(w_down, True)
    arrived = semaphores(experts.MAX_COUNTERS, x.device)
    y = torch.ops.parrot_ext.expert_combine_fp8_cuda(
        *operands, route.places, route.experts, x, arrived, residual_scale
    )  # fmt: skip
    return y, z


_PARTS = Parts(forward=_fwd, backward=experts._PARTS.backward, weighted=True)
expert_mlp_dense_fwd, expert_mlp_topk_fwd = _PARTS.expert_mlp_dense_fwd, _PARTS.expert_mlp_topk_fwd
