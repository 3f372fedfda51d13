"""Plain PyTorch `swiglu`, fp32 inside; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# J segments, V rows a segment, I inner width


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def swiglu_fwd(z: Tensor, weights: Tensor | None) -> Tensor:
    """See the contract in the package docstring."""
    gate, up = z.to(_acc(z)).unbind(-2)
    h = F.silu(gate) * up
    return (h if weights is None else h * weights[:, None, None]).to(z.dtype)


def swiglu_bwd(grad: Tensor, z: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    acc = _acc(z)
    gate, up = z.to(acc).unbind(-2)
    sigmoid = gate.sigmoid()
    silu, grad = gate * sigmoid, grad.to(acc)
    grad_weights = grad.new_empty(0)
    if weights is not None:
        grad_weights = (grad * silu * up).sum((1, 2))
        grad = grad * weights[:, None, None]
    grad_z = torch.stack((grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu), dim=-2)
    return grad_z.to(z.dtype), grad_weights
