"""The backward passes of `grouped_gemm`: the same composition of launchers in every back end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width

Needs = tuple[bool, bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The launchers of one back end that its backward passes are made of."""

    m_grouped_gemm: Callable[..., Tensor]
    k_grouped_gemm: Callable[..., Tensor]
    swiglu_bwd: Callable[..., tuple[Tensor, Tensor]]
    unpermute_fwd: Callable[..., Tensor]

    def m_grouped_gemm_bwd(
        self,
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
        grad_x, grad_w = x.new_empty(0), x.new_empty(0)
        if needs[0]:
            grad_x = self.m_grouped_gemm(grad, w, offsets, None, 1, not trans_w)
            if plan is not None:  # rows that were read several times add up
                grad_x = self.unpermute_fwd(grad_x.flatten(1), None, plan, topk, len(x)).view_as(x)
        if needs[1]:
            if trans_w or plan is not None:
                grad_w = self.k_grouped_gemm(grad, x, offsets, plan, topk)
                grad_w = grad_w if trans_w else grad_w.transpose(1, 2).contiguous()
            else:
                grad_w = self.k_grouped_gemm(x, grad, offsets, None, 1)
        return grad_x, grad_w

    def m_grouped_swiglu_bwd(
        self,
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
        w = w_gate_up.flatten(1, 2)
        if z.dim() == 1:
            z = self.m_grouped_gemm(x, w, offsets, plan, topk, True).unflatten(-1, w_gate_up.shape[1:3])
        grad_z, grad_weights = self.swiglu_bwd(grad, z, weights)
        grad_x, grad_w = self.m_grouped_gemm_bwd(grad_z.flatten(2), x, w, offsets, plan, topk, True, needs)
        return grad_x, grad_w.view_as(w_gate_up) if needs[1] else grad_w, grad_weights
