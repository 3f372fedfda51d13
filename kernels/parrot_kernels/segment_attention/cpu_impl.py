"""CPU `segment_attention`: blocks of query rows, each with the keys that it sees, so that memory is linear."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.ranged_attention import Grads, blocked_attention_bwd, blocked_attention_fwd, gradients, why_not_cpu

# T query rows, M key rows


def why_not(*args: object) -> str | None:
    """Needs CPU tensors, whose segments it reads."""
    return why_not_cpu(*args)


def segment_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, kv_start: Tensor, kv_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = query.dtype, torch.promote_types(query.dtype, torch.float32)
    columns = query.new_empty(key.shape[0], 0, dtype=acc)
    out, _, lse = blocked_attention_fwd(query.to(acc), key.to(acc), value.to(acc), columns, kv_start, kv_end, scale)
    return out.to(dtype), lse


def segment_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_start: Tensor,
    kv_end: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> Grads:
    """See the contract in the package docstring."""
    acc = lse.dtype
    # No extra value columns: their outputs and gradients are zero wide.
    columns, grad_extra = lse.new_empty(key.shape[0], 0), lse.new_empty(*lse.shape, 0)
    inputs = (query.to(acc), key.to(acc), value.to(acc), columns, kv_start, kv_end)
    *grads, _ = blocked_attention_bwd(grad_out.to(acc), grad_extra, grad_lse, *inputs, scale, (*needs, False))
    return gradients(grads, (query, key, value))
