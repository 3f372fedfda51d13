"""CPU `paged_attention`: C++ loops that read the cache in place, one task for a request, a key head and a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension


def why_not(*args: object) -> str | None:
    """Needs the C++ extension, CPU tensors, and float32 or bfloat16."""
    return _extension.why_not_loops(args, op="paged_attention")


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    columns: Tensor | None,
    visible: Tensor | None,
    max_seqlen_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, num_heads, _ = query.shape
    out = query.new_empty(query.shape)
    extra = query.new_empty((num_heads, num_rows, 2) if columns is not None else 0, dtype=torch.float32)
    torch.ops.parrot_ext.paged_attention(
        query.contiguous(),
        key_cache,
        value_cache,
        block_tables.contiguous(),
        cu_seqlens_q,
        kv_lengths,
        extra.new_empty(0, 2) if columns is None else columns.float().contiguous(),
        query.new_empty(0, 0, dtype=torch.bool) if visible is None else visible.contiguous(),
        scale,
        out,
        extra,
    )
    return out, extra
