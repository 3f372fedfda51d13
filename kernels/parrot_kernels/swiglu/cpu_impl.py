"""CPU `swiglu`: the C++ loops that `expert_mlp` also runs."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension

# J segments, V rows a segment, I inner width


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    return _extension.why_not_loops(args)


def _matrix(weights: Tensor | None, z: Tensor) -> Tensor:
    """[J, 1], what the loops take: weights of one expert."""
    return z.new_ones(len(z), 1, dtype=torch.float32) if weights is None else weights.unsqueeze(1)


def swiglu_fwd(z: Tensor, weights: Tensor | None) -> Tensor:
    """See the contract in the package docstring."""
    h = z.new_empty(*z.shape[:2], z.shape[-1])
    torch.ops.parrot_ext.swiglu_fwd(z.unsqueeze(2), _matrix(weights, z), h)
    return h


def swiglu_bwd(grad: Tensor, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    grad_z = torch.empty_like(z)
    # The loop leaves the weighted h in its copy of grad.
    sums = torch.ops.parrot_ext.swiglu_bwd(z.unsqueeze(2), _matrix(weights, z), grad.clone(), grad_z.unsqueeze(2))
    return grad_z, z.new_empty(0, dtype=torch.float32) if weights is None else sums[:, 0]
