"""CPU `expert_mlp`: BLAS products expert by expert, with the weighted SwiGLU and its backward pass in C++.

Going expert by expert costs the same multiplications as one fat product, but the buffers between the two products are E
times smaller and serve the next expert again: they stay in the cache and their pages are touched once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parrot_kernels import _extension

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk, J <= n * K chosen segments

Scales = tuple[float, float]
Needs = tuple[bool, bool, bool, bool]
Grads = tuple[Tensor, Tensor, Tensor, Tensor]


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


@dataclass(frozen=True, slots=True)
class _Group:
    """One expert and the m images that it works on."""

    expert: int
    segments: slice
    """Where its m segments stand in z [segments, V, 2, I]."""
    images: Tensor | slice
    """[m] int64, or a run of consecutive images, which is read and written in place."""

    @property
    def size(self) -> int:
        return self.segments.stop - self.segments.start

    def take(self, tensor: Tensor) -> Tensor:
        """[n, ...] -> [m, ...]."""
        return tensor[self.images] if isinstance(self.images, slice) else tensor.index_select(0, self.images)

    def rows(self, tensor: Tensor) -> Tensor:
        """[n, V, H] -> [m * V, H]."""
        return self.take(tensor).flatten(0, 1)

    def weights(self, probs: Tensor) -> Tensor:
        """[n, E] -> contiguous [m, 1]."""
        return self.take(probs[:, self.expert : self.expert + 1]).contiguous()

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total[images] += left [m * V, k] @ right [k, H]."""
        if isinstance(self.images, slice):
            total[self.images].flatten(0, 1).addmm_(left, right)
        else:
            total.index_add_(0, self.images, (left @ right).view(self.size, *total.shape[1:]))


def _dense_groups(probs: Tensor) -> list[_Group]:
    num_images, num_experts = probs.shape
    everything = slice(0, num_images)
    return [_Group(e, slice(e * num_images, (e + 1) * num_images), everything) for e in range(num_experts)]


def _topk_groups(topk_indices: Tensor, expert_offsets: Tensor, plan: Tensor) -> list[_Group]:
    images = plan // topk_indices.shape[1]
    values = images.tolist()
    groups = []
    for expert, (start, stop) in enumerate(pairwise(expert_offsets.tolist())):
        chosen: Tensor | slice = images[start:stop]
        # The plan is ascending within an expert, so first and last tell whether the images are consecutive.
        if start < stop and values[stop - 1] - values[start] == stop - start - 1:
            chosen = slice(values[start], values[stop - 1] + 1)
        groups.append(_Group(expert, slice(start, stop), chosen))
    return groups


class _Up:
    """z of one expert after the other: written into what is saved, or into one buffer for all."""

    def __init__(self, x: Tensor, w_gate_up: Tensor, groups: list[_Group], save: bool) -> None:
        self._w_gate_up = w_gate_up
        self._save = save
        sizes = [group.size for group in groups]
        count = sum(sizes) if save else max(sizes)
        self.z = x.new_empty(count, x.shape[1], *w_gate_up.shape[1:3])

    def __call__(self, group: _Group, rows: Tensor) -> Tensor:
        """[m, V, 2, I] for rows [m * V, H]."""
        z = self.z[group.segments] if self._save else self.z[: group.size]
        torch.mm(rows, self._w_gate_up[group.expert].flatten(0, 1).T, out=_matrix(z))
        return z


def _matrix(z: Tensor) -> Tensor:
    """[m, V, 2, I] -> [m * V, 2 * I]."""
    return z.flatten(0, 1).flatten(1)


def _fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, groups: list[_Group], scales: Scales, save_z: bool
) -> tuple[Tensor, Tensor]:
    """y, and z [segments, V, 2, I] or an empty tensor."""
    residual_scale, output_scale = scales
    weights = probs * output_scale
    y = x * residual_scale
    up = _Up(x, w_gate_up, groups, save_z)
    hidden = x.new_empty(max(group.size for group in groups), x.shape[1], w_down.shape[1])
    for group in groups:
        z = up(group, group.rows(x))
        h = hidden[: group.size]
        torch.ops.parrot_ext.swiglu_fwd(z.unsqueeze(2), group.weights(weights), h)
        group.add_product(y, h.flatten(0, 1), w_down[group.expert])
    return y, up.z if save_z else x.new_empty(0)


def _bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    groups: list[_Group],
    z: Tensor,
    scales: Scales,
    needs: Needs,
) -> Grads:
    """`z` as `_fwd` returned it."""
    residual_scale, output_scale = scales
    needs_x, needs_gate_up, needs_down, needs_probs = needs
    none = x.new_empty(0)  # cloned for each use: outputs of an op must not alias
    grad_x = grad * residual_scale if needs_x else none.clone()
    grad_gate_up = torch.empty_like(w_gate_up) if needs_gate_up else none.clone()
    grad_down = torch.empty_like(w_down) if needs_down else none.clone()
    grad_probs = torch.zeros_like(probs) if needs_probs else probs.new_empty(0)

    recompute = None if z.numel() else _Up(x, w_gate_up, groups, save=False)
    weights = probs * output_scale
    largest = max(group.size for group in groups)
    grad_hidden = x.new_empty(largest, x.shape[1], w_down.shape[1])
    grad_up = x.new_empty(largest, x.shape[1], *w_gate_up.shape[1:3])
    for group in groups:
        e, rows, grad_rows = group.expert, group.rows(x), group.rows(grad)
        own_z = recompute(group, rows) if recompute else z[group.segments]
        grad_h, grad_z = grad_hidden[: group.size], grad_up[: group.size]
        torch.mm(grad_rows, w_down[e].T, out=grad_h.flatten(0, 1))
        # Leaves the weighted h in grad_h.
        grad_weights = torch.ops.parrot_ext.swiglu_bwd(
            own_z.unsqueeze(2), group.weights(weights), grad_h, grad_z.unsqueeze(2)
        )
        if needs_probs:
            grad_probs[group.images, e] = grad_weights[:, 0] * output_scale
        if needs_down:
            torch.mm(grad_h.flatten(0, 1).T, grad_rows, out=grad_down[e])
        if needs_gate_up:
            torch.mm(_matrix(grad_z).T, rows, out=grad_gate_up[e].flatten(0, 1))
        if needs_x:
            group.add_product(grad_x, _matrix(grad_z), w_gate_up[e].flatten(0, 1))
    return grad_x, grad_gate_up, grad_down, grad_probs


def expert_mlp_dense_fwd(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, scales: Scales, save_z: bool
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    y, z = _fwd(x, w_gate_up, w_down, probs, _dense_groups(probs), scales, save_z)
    return y, z.unflatten(0, (w_down.shape[0], -1)) if save_z else z


def expert_mlp_dense_bwd(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, z: Tensor, scales: Scales, needs: Needs
) -> Grads:
    """See the contract in the package docstring."""
    z = z.flatten(0, 1) if z.numel() else z
    return _bwd(grad, x, w_gate_up, w_down, probs, _dense_groups(probs), z, scales, needs)


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
    groups = _topk_groups(topk_indices, expert_offsets, plan)
    return _fwd(x, w_gate_up, w_down, probs, groups, scales, save_z)


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
    groups = _topk_groups(topk_indices, expert_offsets, plan)
    return _bwd(grad, x, w_gate_up, w_down, probs, groups, z, scales, needs)
