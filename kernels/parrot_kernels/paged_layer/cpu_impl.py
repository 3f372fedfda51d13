"""CPU `paged_layer`: the C++ loops of `few_rows_linear` and `paged_attention`, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_kernels import _extension


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    return _extension.why_not_loops(args, op="paged_layer")


def paged_layer(*args: Any) -> Tensor:
    """See the contract in the package docstring."""
    out: Tensor = torch.ops.parrot_ext.paged_layer(*args)
    return out
