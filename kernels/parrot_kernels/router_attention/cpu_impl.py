"""CPU `router_attention`: blocks of query rows, each with the keys that it sees, so that memory is linear.

Plain torch: the products are BLAS calls on blocks large enough for it, and a block holds several short samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.ranged_attention import Grads, blocked_attention_bwd, blocked_attention_fwd, gradients, why_not_cpu
from parrot_kernels.router_attention.reference import Needs, columns_of_keys, seen_keys


def why_not(*args: object) -> str | None:
    """Needs CPU tensors, whose ranges it reads."""
    return why_not_cpu(*args)


def router_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = query.dtype, torch.promote_types(query.dtype, torch.float32)
    start, end, key_positions = seen_keys(query.shape[0], key.shape[0], cu_seqlens_q, cu_seqlens_kv, positions)
    own = columns_of_keys(columns.to(acc), key_positions)
    out, extra, lse = blocked_attention_fwd(query.to(acc), key.to(acc), value.to(acc), own, start, end, scale)
    return out.to(dtype), extra, lse


def router_attention_bwd(
    grad_out: Tensor,
    grad_extra: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    positions: Tensor | None,
    out: Tensor,
    extra: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    needs: Needs,
) -> Grads:
    """See the contract in the package docstring."""
    acc = lse.dtype
    start, end, key_positions = seen_keys(query.shape[0], key.shape[0], cu_seqlens_q, cu_seqlens_kv, positions)
    grad_extra = torch.zeros_like(extra) if grad_extra is None else grad_extra
    own = columns_of_keys(columns.to(acc), key_positions)
    inputs = (query.to(acc), key.to(acc), value.to(acc), own, start, end)
    *grads, grad_own = blocked_attention_bwd(grad_out.to(acc), grad_extra, grad_lse, *inputs, scale, needs)
    if grad_own is not None:
        known = (key_positions >= 0) & (key_positions < columns.shape[0])
        grad_own = torch.zeros_like(columns, dtype=acc).index_add_(0, key_positions[known], grad_own[known])
    return gradients((*grads, grad_own), (query, key, value, columns))
