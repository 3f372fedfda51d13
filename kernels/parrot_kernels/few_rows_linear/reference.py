"""Plain PyTorch `few_rows_linear`; any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# M rows, K inputs, N outputs


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


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
    acc = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(acc)
    if gated:
        gate, up = rows.chunk(2, dim=-1)
        rows = F.silu(gate) * up
    if norm is not None:
        rows = F.rms_norm(rows, norm.shape, norm.to(acc), eps)
    out = F.linear(rows, weight.to(acc), None if bias is None else bias.to(acc))
    if residual is not None:
        out = out + residual.to(acc)
    return out.to(x.dtype)
