"""CUDA `grouped_gemm` for Hopper: persistent tensor-core products fed by tensor copies (csrc/cuda/*grouped_gemm*)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from parrot_kernels import cuda_support
from parrot_kernels.grouped_gemm.backward import Needs, Parts

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width

MAX_ROWS = 2**31 - 1025


def why_not(*args: object) -> str | None:
    """Needs Hopper, bfloat16 or float16, and widths that are multiples of 8."""
    if reason := cuda_support.why_not(*args, dtypes=(torch.bfloat16, torch.float16)):
        return reason
    if len(args) < 5:
        return None
    x, w, _, plan, *_ = args
    assert isinstance(x, Tensor)
    assert isinstance(w, Tensor)
    if (rows := x.shape[1] * max(len(x), len(plan) if isinstance(plan, Tensor) else 0)) > MAX_ROWS:
        return f"it counts at most {MAX_ROWS} rows, got {rows}"
    weights_given = len(args) > 5  # else k_grouped_gemm, where w holds rows too
    for width in (x.shape[-1], w.shape[-1], *([w.shape[-2]] if weights_given else [])):
        if reason := cuda_support.why_not_aligned("each width", width, x):
            return reason
    return cuda_support.why_not_aligned("each width", w.shape[-1], w)


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    return torch.ops.parrot_ext.m_grouped_gemm_cuda(x, w, offsets, plan, topk, trans_w)


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    return torch.ops.parrot_ext.m_grouped_swiglu_cuda(x, w_gate_up, offsets, plan, topk, weights, save_z)


def k_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    """See the contract in the package docstring."""
    return torch.ops.parrot_ext.k_grouped_gemm_cuda(a, b, offsets, plan, topk)


@functools.cache
def _parts() -> Parts:
    """What is bound by memory runs on Triton, imported when it is needed first."""
    from parrot_kernels.permute import triton_impl as permute
    from parrot_kernels.swiglu import triton_impl as swiglu

    return Parts(
        m_grouped_gemm=m_grouped_gemm,
        k_grouped_gemm=k_grouped_gemm,
        swiglu_bwd=swiglu.swiglu_bwd,
        unpermute_fwd=permute.unpermute_fwd,
    )


def m_grouped_gemm_bwd(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    trans_w: bool,
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    return _parts().m_grouped_gemm_bwd(grad, x, w, offsets, plan, topk, trans_w, needs)


def m_grouped_swiglu_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    z: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    return _parts().m_grouped_swiglu_bwd(grad, x, w_gate_up, offsets, plan, topk, weights, z, needs)
