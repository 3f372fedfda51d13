"""Comparisons that NaN does not pass."""

from __future__ import annotations

from torch import Tensor


def differ(first: Tensor, second: Tensor, atol: float = 0.0) -> bool:
    """Whether two tensors are numbers, and at least one of them another one in both."""
    return 0 <= atol < float((first - second).detach().double().abs().max()) < float("inf")
