"""CUDA `expert_mlp` for Hopper (csrc/cuda/expert_*, *grouped_gemm*, gemm_*): two products forward, four backward.

    up-projection    `m_grouped_swiglu`: gate and up products, SwiGLU and weight in the epilogue
    down-projection  `expert_combine`: one product over K * I for the rows of an image, with the residual
    backward         `expert_hidden_bwd`: the gradient of h with SwiGLU's backward pass in its epilogue; then the
                     down-projection's kernel for x and `k_grouped_gemm` for the weights
Dense is the same kernels: each expert takes all rows. The route is laid out, and the gradient of its weights summed, by
the small Triton kernels of `route.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import cuda_support
from parrot_kernels.expert_mlp.launchers import Grads, Needs, Parts
from parrot_kernels.expert_mlp.route import Route
from parrot_kernels.grouped_gemm.cuda_impl import MAX_ROWS
from parrot_kernels.semaphores import semaphores

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk,
# J segments: at most n * K, or E * n (dense)

# Of tiles whose reduction is split: fewer pairs than pairs of multiprocessors, four counters each.
MAX_COUNTERS = 1024
# Rows of a chosen image are boxes of their own, of 64 or 128 rows. Smaller images are Triton's, whose products gather
# their rows on the way to shared memory, in both passes. A path here would move no byte less: up to some 184 rows an
# expert (790 TFLOP/s over 4.3 TB/s; a row makes 2 operations with 2 bytes of a matrix) the limit is reading the
# weights, once in either. With 2 of 6 experts chosen these are 17 images of 32 rows. And `expert_hidden_bwd` would need
# a second schedule: a warp group that gathers leaves too few registers for ping-pong, and boxes of z and h that end at
# the last row of an expert, not of an image.
MIN_CHOSEN_ROWS = 64


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
        if rows < MIN_CHOSEN_ROWS:
            return f"it takes chosen images of at least {MIN_CHOSEN_ROWS} rows, got {rows}"
    if (count := rows * max(segments, len(x))) > MAX_ROWS:
        return f"it counts at most {MAX_ROWS} rows, got {count}"
    for width in w_down.shape[1:]:
        if reason := cuda_support.why_not_aligned("each width", width, x):
            return reason
    for weight in (w_gate_up, w_down):
        if reason := cuda_support.why_not_aligned("each width", weight.shape[-1], weight):
            return reason
    return None


def _up(x: Tensor, w_gate_up: Tensor, route: Route, save_z: bool) -> tuple[Tensor, Tensor]:
    """Weighted h [J, V, I], and z [J, V, 2, I] or [0]."""
    return torch.ops.parrot_ext.m_grouped_swiglu_cuda(
        x, w_gate_up, route.offsets, route.plan, route.topk, route.weights, save_z
    )


def _combine(a: Tensor, w: Tensor, route: Route, residual: Tensor, residual_scale: float) -> Tensor:
    """residual_scale * residual [n, V, N] + the sum of a [J, V, K] @ w [E, K, N] over the segments of each image."""
    if not len(a):  # no image has an expert
        return residual * residual_scale
    arrived = semaphores(MAX_COUNTERS, a.device)
    return torch.ops.parrot_ext.expert_combine_cuda(
        a, w, route.places, route.experts, residual, arrived, residual_scale
    )


def _fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, route: Route, residual_scale: float, save_z: bool
) -> tuple[Tensor, Tensor]:
    """y, and z [J, V, 2, I] or an empty tensor."""
    h, z = _up(x, w_gate_up, route, save_z)
    return _combine(h, w_down, route, x, residual_scale), z


def _bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    route: Route,
    z: Tensor,
    residual_scale: float,
    needs: Needs,
) -> Grads:
    """The first three gradients, and the sums that make that of probs; `z` as `_fwd` returned it."""
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
        sums,
    )


_PARTS = Parts(forward=_fwd, backward=_bwd, weighted=True)
expert_mlp_dense_fwd, expert_mlp_dense_bwd = _PARTS.expert_mlp_dense_fwd, _PARTS.expert_mlp_dense_bwd
expert_mlp_topk_fwd, expert_mlp_topk_bwd = _PARTS.expert_mlp_topk_fwd, _PARTS.expert_mlp_topk_bwd
