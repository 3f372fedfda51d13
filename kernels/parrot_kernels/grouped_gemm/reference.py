"""Plain PyTorch `grouped_gemm`, fp32 inside; any device, no host synchronisation.

It masks: every group's matrix meets every row, and what belongs to the group is kept. Simple and free of data-dependent
shapes, at G times the work of a back end that follows the offsets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_kernels.grouped_gemm.backward import Parts
from parrot_kernels.permute import reference as permute
from parrot_kernels.swiglu import reference as swiglu

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _gathered(x: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    """[J, V, K] in the accumulation dtype."""
    x = x.to(_acc(x))
    return x if plan is None else x[plan // topk]


def _group_masks(offsets: Tensor, segments: int) -> Tensor:
    """[G, J, 1] bool: which segments each group holds."""
    at = torch.arange(segments, device=offsets.device)
    return ((at >= offsets[:-1, None]) & (at < offsets[1:, None]))[..., None]


def m_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool) -> Tensor:
    """See the contract in the package docstring."""
    rows = _gathered(x, plan, topk)
    y = rows.new_zeros(*rows.shape[:2], w.shape[1] if trans_w else w.shape[2])
    for matrix, mask in zip(w.to(rows.dtype), _group_masks(offsets, len(rows)), strict=True):
        y = torch.where(mask[..., None], rows @ (matrix.T if trans_w else matrix), y)
    return y.to(x.dtype)


def m_grouped_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, weights: Tensor | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    exact = m_grouped_gemm(x.to(_acc(x)), w_gate_up.flatten(1, 2).to(_acc(x)), offsets, plan, topk, True)
    z = exact.unflatten(-1, w_gate_up.shape[1:3])
    gate, up = z.unbind(-2)
    h = F.silu(gate) * up
    if weights is not None:
        live = _group_masks(offsets, len(weights)).any(0)
        h = h * weights[:, None].where(live, 0)[..., None]
    return h.to(x.dtype), z.to(x.dtype) if save_z else x.new_empty(0)


def k_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    """See the contract in the package docstring."""
    rows = _gathered(b, plan, topk)
    masks = _group_masks(offsets, len(rows))[..., None]
    # Where, not times: what stands in padding may be NaN.
    groups = [torch.einsum("jvn,jvk->nk", a.to(rows.dtype).where(m, 0), rows.where(m, 0)) for m in masks]
    return torch.stack(groups).to(b.dtype)


_PARTS = Parts(
    m_grouped_gemm=m_grouped_gemm,
    k_grouped_gemm=k_grouped_gemm,
    swiglu_bwd=swiglu.swiglu_bwd,
    unpermute_fwd=permute.unpermute_fwd,
)
m_grouped_gemm_bwd, m_grouped_swiglu_bwd = _PARTS.m_grouped_gemm_bwd, _PARTS.m_grouped_swiglu_bwd
