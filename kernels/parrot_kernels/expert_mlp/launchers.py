"""The launchers of `expert_mlp` from the parts of a back end: the two forms differ in the route and the shape of z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_kernels.expert_mlp.route import Route, dense_route, grad_probs, topk_route

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk, J segments

Scales = tuple[float, float]
Needs = tuple[bool, bool, bool, bool]
Grads = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What one back end computes along a route."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """(x, w_gate_up, w_down, route, residual_scale, save_z) -> y, and z [J, V, 2, I] or [0]."""
    backward: Callable[..., Grads]
    """(grad, x, w_gate_up, w_down, route, z, residual_scale, needs) -> the first three gradients, and sums [B, J, V]
    that make that of the weights."""
    weighted: bool
    """Whether routes have the weights of the segments."""

    def expert_mlp_dense_fwd(
        self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, scales: Scales, save_z: bool
    ) -> tuple[Tensor, Tensor]:
        """See the contract in the package docstring."""
        route = dense_route(probs, scales[1], weighted=self.weighted)
        y, z = self.forward(x, w_gate_up, w_down, route, scales[0], save_z)
        return y, z.view(w_down.shape[0], *x.shape[:2], *w_gate_up.shape[1:3]) if save_z else z

    def expert_mlp_dense_bwd(
        self,
        grad: Tensor,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        probs: Tensor,
        z: Tensor,
        scales: Scales,
        needs: Needs,
    ) -> Grads:
        """See the contract in the package docstring."""
        route = dense_route(probs, scales[1], weighted=self.weighted)
        z = z.flatten(0, 1) if z.dim() > 1 else z
        return self._bwd(grad, x, w_gate_up, w_down, route, z, scales, needs)

    def expert_mlp_topk_fwd(
        self,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        probs: Tensor,
        topk_indices: Tensor,
        expert_offsets: Tensor,
        plan: Tensor,
        scales: Scales,
        save_z: bool,
    ) -> tuple[Tensor, Tensor]:
        """See the contract in the package docstring."""
        route = topk_route(probs, topk_indices, expert_offsets, plan, scales[1], weighted=self.weighted)
        return self.forward(x, w_gate_up, w_down, route, scales[0], save_z)

    def expert_mlp_topk_bwd(
        self,
        grad: Tensor,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        probs: Tensor,
        topk_indices: Tensor,
        expert_offsets: Tensor,
        plan: Tensor,
        z: Tensor,
        scales: Scales,
        needs: Needs,
    ) -> Grads:
        """See the contract in the package docstring."""
        route = topk_route(probs, topk_indices, expert_offsets, plan, scales[1], weighted=self.weighted)
        return self._bwd(grad, x, w_gate_up, w_down, route, z, scales, needs)

    def _bwd(
        self,
        grad: Tensor,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        route: Route,
        z: Tensor,
        scales: Scales,
        needs: Needs,
    ) -> Grads:
        if not x.shape[0]:
            tensors = (x, w_gate_up, w_down, route.probs)
            none = [torch.zeros_like(t) if needed else t.new_empty(0) for t, needed in zip(tensors, needs, strict=True)]
            return none[0], none[1], none[2], none[3]
        *grads, sums = self.backward(grad, x, w_gate_up, w_down, route, z, scales[0], needs)
        own = grad_probs(sums, route) if needs[3] else route.probs.new_empty(0)
        return grads[0], grads[1], grads[2], own
