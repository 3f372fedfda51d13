"""Plain PyTorch `router_attention` with the whole [n, T, M] matrix; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.ranged_attention import Grads, attention_bwd, attention_fwd, gradients

# T query rows, M key rows, S samples, n query heads, P positions

Needs = tuple[bool, bool, bool, bool]


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def seen_keys(
    num_rows: int, num_keys: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """First key row and one past the last that each query row sees [T], and the position of each key row [M]."""
    rows = torch.arange(num_rows, device=cu_seqlens_q.device)
    keys = torch.arange(num_keys, device=cu_seqlens_q.device)
    # Of equal boundaries (empty samples) the last one owns the row.
    row_sample = torch.searchsorted(cu_seqlens_q, rows, right=True) - 1
    key_sample = torch.searchsorted(cu_seqlens_kv, keys, right=True) - 1
    if positions is None:
        lengths_q, lengths_kv = cu_seqlens_q.diff(), cu_seqlens_kv.diff()
        positions = torch.stack((lengths_kv - lengths_q, torch.zeros_like(lengths_kv)), dim=1)
    start, stop = cu_seqlens_kv[row_sample], cu_seqlens_kv[row_sample + 1]
    row_positions = rows - cu_seqlens_q[row_sample] + positions[row_sample, 0]
    end = start + row_positions - positions[row_sample, 1] + 1
    key_positions = keys - cu_seqlens_kv[key_sample] + positions[key_sample, 1]
    return start, torch.minimum(end, stop), key_positions


def columns_of_keys(columns: Tensor, key_positions: Tensor) -> Tensor:
    """[M, 2]: the columns at the position of each key, zero where they have no such position."""
    known = (key_positions >= 0) & (key_positions < columns.shape[0])
    return torch.cat((columns, columns.new_zeros(1, 2)))[torch.where(known, key_positions, columns.shape[0])]


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
    out, extra, lse = attention_fwd(query.to(acc), key.to(acc), value.to(acc), own, start, end, scale)
    return out.to(dtype).contiguous(), extra, lse


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
    *grads, grad_own = attention_bwd(grad_out.to(acc), grad_extra, grad_lse, *inputs, scale, needs)
    # A product with one-hot rows: index_add adds in any order on a GPU.
    one_hot = key_positions == torch.arange(columns.shape[0], device=columns.device)[:, None]
    grads.append(None if grad_own is None else one_hot.to(acc) @ grad_own)
    return gradients(grads, (query, key, value, columns))
