"""CPU `grouped_gemm`: one BLAS product a group, gathered groups by one row copy; the weighted SwiGLU in C++.

On the CPU the offsets can be read, so the products run on slices and nothing is padded or masked. There is no C++ here:
BLAS is the limit (docs/kernels.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from parrot_kernels import _extension
from parrot_kernels.grouped_gemm.backward import Parts
from parrot_kernels.permute import cpu_impl as permute
from parrot_kernels.swiglu import cpu_impl as swiglu

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    if reason := _extension.why_not():
        return reason
    for tensor in args:
        if isinstance(tensor, Tensor):
            if tensor.device.type != "cpu":
                return f"it needs CPU tensors, got {tensor.device.type}"
            if tensor.dtype not in (torch.float32, torch.bfloat16) and tensor.is_floating_point():
                return f"it needs float32 or bfloat16, got {tensor.dtype}"
    return None


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and segments of each group."""
    for group, (start, stop) in enumerate(pairwise(offsets.tolist())):
        yield group, slice(start, stop)


def _rows(x: Tensor, segments: slice, plan: Tensor | None, topk: int) -> Tensor:
    """[m * V, K]: the group's rows of x, in place or copied."""
    own = x[segments] if plan is None else x.index_select(0, plan[segments] // topk)
    return own.flatten(0, 1)


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    segments = len(x) if plan is None else len(plan)
    y = x.new_empty(segments, x.shape[1], w.shape[1] if trans_w else w.shape[2])
    last = 0
    for group, own in _groups(offsets):
        matrix = w[group].T if trans_w else w[group]
        torch.mm(_rows(x, own, plan, topk), matrix, out=y[own].flatten(0, 1))
        last = own.stop
    y[last:] = 0
    return y


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    z = m_grouped_gemm(x, w_gate_up.flatten(1, 2), offsets, plan, topk, True).unflatten(-1, w_gate_up.shape[1:3])
    factors = x.new_ones(len(z), dtype=torch.float32) if weights is None else weights
    h = x.new_empty(*z.shape[:2], z.shape[-1])
    live = int(offsets[-1])
    torch.ops.parrot_ext.swiglu_fwd(z[:live].unsqueeze(2), factors[:live, None].contiguous(), h[:live])
    h[live:] = 0
    return h, z if save_z else x.new_empty(0)


def k_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    """See the contract in the package docstring."""
    out = a.new_empty(len(offsets) - 1, a.shape[-1], b.shape[-1])
    for group, own in _groups(offsets):
        torch.mm(a[own].flatten(0, 1).T, _rows(b, own, plan, topk), out=out[group])
    return out


_PARTS = Parts(
    m_grouped_gemm=m_grouped_gemm,
    k_grouped_gemm=k_grouped_gemm,
    swiglu_bwd=swiglu.swiglu_bwd,
    unpermute_fwd=permute.unpermute_fwd,
)
m_grouped_gemm_bwd, m_grouped_swiglu_bwd = _PARTS.m_grouped_gemm_bwd, _PARTS.m_grouped_swiglu_bwd
