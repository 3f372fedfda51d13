"""CPU `few_rows_linear`: C++ loops that read the weights in place, several at a time for all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension

# M rows, K inputs, N outputs


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    return _extension.why_not_loops(args, op="few_rows_linear")


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    eps: float,
) -> Tensor:
    """See the contract in the package docstring."""
    out: Tensor = torch.ops.parrot_ext.few_rows_linear(x.contiguous(), weight, norm, bias, residual, gated, eps)
    return out
