"""CUDA `expert_mlp` for Hopper (csrc/cuda/expert_*, *grouped_gemm*, gemm_*): two products forward, four backward.

    up-projection    `m_grouped_swiglu`: gate and up products, SwiGLU and weight in the epilogue
    down-projection  `expert_combine`: one product over K * I for the rows of an image, with the residual
    backward         `expert_hidden_bwd`: the gradient of h with SwiGLU's backward pass in its epilogue; then the
                     down-projection's kernel for x and `k_grouped_gemm` for the weights
Dense is the same kernels: each expert takes all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_kernels import cuda_support
from parrot_kernels.grouped_gemm.cuda_impl import MAX_ROWS, MIN_GATHERED_ROWS
from parrot_kernels.semaphores import semaphores

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk,
# J segments: at most n * K, or E * n (dense)

Scales = tuple[float, float]
Needs = tuple[bool, bool, bool, bool]
Grads = tuple[Tensor, Tensor, Tensor, Tensor]

# Of tiles whose reduction is split: fewer pairs than pairs of multiprocessors, four counters each.
MAX_COUNTERS = 1024


def why_not(*args: object) -> str | None:
    """Needs Hopper, bfloat16 or float16, H and I that are multiples of 8, and in the top-k form images of 64 rows."""
    if reason := cuda_support.why_not(*args, dtypes=(torch.bfloat16, torch.float16)):
        return reason
    if len(args) < 4:
        return None
    x, w_gate_up, w_down = args[:3]
    assert isinstance(x, Tensor)
    assert isinstance(w_gate_up, Tensor)
    assert isinstance(w_down, Tensor)
    rows, segments = x.shape[1], len(x) * len(w_down)
    if len(args) > 4:
        plan = args[6]
        assert isinstance(plan, Tensor)
        segments = len(plan)
        if rows < MIN_GATHERED_ROWS:
            return f"it takes chosen images of at least {MIN_GATHERED_ROWS} rows, got {rows}"
    if (count := rows * max(segments, len(x))) > MAX_ROWS:
        return f"it counts at most {MAX_ROWS} rows, got {count}"
    for width in w_down.shape[1:]:
        if reason := cuda_support.why_not_aligned("each width", width, x):
            return reason
    for weight in (w_gate_up, w_down):
        if reason := cuda_support.why_not_aligned("each width", weight.shape[-1], weight):
            return reason
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Route:
    """Which expert runs on which image, by segment: chosen pairs in the order of the plan, or E times all images."""

    weights: Tensor
    """[J] float32, times output_scale."""
    offsets: Tensor | None = None
    """[E + 1]; None in the dense form, as all that follow."""
    plan: Tensor | None = None
    """[J]"""
    places: Tensor | None = None
    """[n * K], the inverse of the plan; -1 at positions that it lacks."""
    experts: Tensor | None = None
    """[n, K]"""
    topk: int


def _dense_route(probs: Tensor, scale: float) -> _Route:
    return _Route(weights=(probs * scale).T.contiguous().flatten(), topk=probs.shape[1])


def _targets(probs: Tensor, topk_indices: Tensor, plan: Tensor) -> Tensor:
    """[J], where in the flattened probs each segment's weight stands."""
    images = plan.div(topk_indices.shape[1], rounding_mode="floor")
    return images * probs.shape[1] + topk_indices.flatten()[plan]


def _topk_route(probs: Tensor, topk_indices: Tensor, offsets: Tensor, plan: Tensor, scale: float) -> _Route:
    weights = probs.flatten()[_targets(probs, topk_indices, plan)] * scale
    places = torch.full_like(topk_indices, -1).flatten()
    places.scatter_(0, plan, torch.arange(len(plan), device=plan.device))
    return _Route(
        weights=weights, offsets=offsets, plan=plan, places=places, experts=topk_indices, topk=topk_indices.shape[1]
    )


def _up(x: Tensor, w_gate_up: Tensor, route: _Route, save_z: bool) -> tuple[Tensor, Tensor]:
    """Weighted h [J, V, I], and z [J, V, 2, I] or [0]."""
    return torch.ops.parrot_ext.m_grouped_swiglu_cuda(
        x, w_gate_up, route.offsets, route.plan, route.topk, route.weights, save_z
    )


def _combine(a: Tensor, w: Tensor, route: _Route, residual: Tensor, residual_scale: float) -> Tensor:
    """residual_scale * residual [n, V, N] + the sum of a [J, V, K] @ w [E, K, N] over the segments of each image."""
    if not len(a):  # no image has an expert
        return residual * residual_scale
    arrived = semaphores(MAX_COUNTERS, a.device)
    return torch.ops.parrot_ext.expert_combine_cuda(
        a, w, route.places, route.experts, residual, arrived, residual_scale
    )


def _fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, route: _Route, residual_scale: float, save_z: bool
) -> tuple[Tensor, Tensor]:
    """y, and z [J, V, 2, I] or an empty tensor."""
    h, z = _up(x, w_gate_up, route, save_z)
    return _combine(h, w_down, route, x, residual_scale), z


def _bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    route: _Route,
    z: Tensor,
    residual_scale: float,
    needs: Needs,
) -> Grads:
    """The first three gradients, and the sums [J] that make that of probs; `z` as `_fwd` returned it."""
    ops = torch.ops.parrot_ext
    needs_x, needs_gate_up, needs_down, _ = needs
    none = x.new_empty(0)  # cloned for each use: outputs of an op must not alias
    # By the kernel of the forward pass, so that the gradients are the same to the last bit.
    own_z = z if z.dim() > 1 else _up(x, w_gate_up, route, save_z=True)[1]
    chosen = (route.offsets, route.plan, route.topk)
    weighted_h, grad_z, sums = ops.expert_hidden_bwd_cuda(grad, w_down, own_z, route.weights, *chosen)
    grad_z = grad_z.flatten(2)
    return (
        _combine(grad_z, w_gate_up.flatten(1, 2), route, grad, residual_scale) if needs_x else none.clone(),
        ops.k_grouped_gemm_cuda(grad_z, x, *chosen).view_as(w_gate_up) if needs_gate_up else none.clone(),
        ops.k_grouped_gemm_cuda(weighted_h, grad, *chosen) if needs_down else none.clone(),
        sums.sum((0, 2)),
    )


def _bwd_without_images(x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, needs: Needs) -> Grads:
    tensors = (x, w_gate_up, w_down, probs)
    grads = [torch.zeros_like(t) if needed else t.new_empty(0) for t, needed in zip(tensors, needs, strict=True)]
    return grads[0], grads[1], grads[2], grads[3]


def expert_mlp_dense_fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, scales: Scales, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    residual_scale, output_scale = scales
    y, z = _fwd(x, w_gate_up, w_down, _dense_route(probs, output_scale), residual_scale, save_z)
    return y, z.view(len(w_down), *x.shape[:2], *w_gate_up.shape[1:3]) if save_z else z


def expert_mlp_dense_bwd(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, z: Tensor, scales: Scales, needs: Needs
) -> Grads:
    """See the contract in the package docstring."""
    if not len(x):
        return _bwd_without_images(x, w_gate_up, w_down, probs, needs)
    residual_scale, output_scale = scales
    route = _dense_route(probs, output_scale)
    z = z.flatten(0, 1) if z.dim() > 1 else z
    *grads, sums = _bwd(grad, x, w_gate_up, w_down, route, z, residual_scale, needs)
    grad_probs = (sums.view(probs.shape[1], -1).T * output_scale).contiguous() if needs[3] else probs.new_empty(0)
    return grads[0], grads[1], grads[2], grad_probs


def expert_mlp_topk_fwd(
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
    residual_scale, output_scale = scales
    route = _topk_route(probs, topk_indices, expert_offsets, plan, output_scale)
    return _fwd(x, w_gate_up, w_down, route, residual_scale, save_z)


def expert_mlp_topk_bwd(
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
    if not len(x):
        return _bwd_without_images(x, w_gate_up, w_down, probs, needs)
    residual_scale, output_scale = scales
    route = _topk_route(probs, topk_indices, expert_offsets, plan, output_scale)
    *grads, sums = _bwd(grad, x, w_gate_up, w_down, route, z, residual_scale, needs)
    grad_probs = probs.new_empty(0)
    if needs[3]:
        targets = _targets(probs, topk_indices, plan)
        grad_probs = torch.zeros_like(probs).flatten().scatter_(0, targets, sums * output_scale).view_as(probs)
    return grads[0], grads[1], grads[2], grad_probs
