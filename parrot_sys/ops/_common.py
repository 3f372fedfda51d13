"""Small helpers shared by the ops."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and below, float64 for float64: what scores, log-sums and losses are kept in."""
    return torch.promote_types(dtype, torch.float32)


def like_or_empty(tensor: Tensor, needed: bool) -> Tensor:
    """Fake gradient of `tensor`: contiguous with its shape, or [0] when nobody needs it."""
    return tensor.new_empty(tensor.shape if needed else (0,))


def or_none(grad: Tensor, needed: bool) -> Tensor | None:
    """Result for autograd: the gradient, or None when nobody needs it."""
    return grad if needed else None
