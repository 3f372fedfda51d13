"""What a correctness problem is: an op, its formula in plain PyTorch, and inputs.

A problem is the op and the formula on the same inputs, drawn in float64; the formula is evaluated in float64 and in the
dtype under test, as the tolerance rule of `parrot_kernels.testing` wants it. Shapes are edge cases of the contracts,
and one of each op that fills whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]
Make = Callable[[torch.device], "Problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs, with gradients unless the op has none, and two functions of them that must agree."""

    inputs: Tensors
    op: Function
    plain: Function
    gradients: bool = True
    """Whether the op has gradients."""
    exact: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] = field(default=dict)
    """Pairs of integer results that must be equal, computed by the back end in force."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem by name; `make` draws it from torch's global generator, on a device."""

    op: str
    name: str
    make: Make
    large: bool = False
    """Fills whole tiles; too slow for the sanitizer."""
    dtypes: tuple[str, ...] = ("bf16", "fp32", "fp16")
    """Those that it is checked in."""


def wide(tensor: Tensor) -> Tensor:
    """As weights and logits are handed over: float32, or float64 in the exact evaluation."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def normal(device: torch.device, *sizes: int, scale: float = 1.0) -> Tensor:
    """Normal deviates times `scale`, float64."""
    return torch.randn(sizes, dtype=torch.float64).mul_(scale).to(device)
