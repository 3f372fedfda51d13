"""Plain PyTorch `paged_attention`, which copies the cache of each request; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# T query rows, S requests of at most L rows, n = g * r heads, d head width, B blocks of N rows, W blocks of a table


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


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
    num_rows, num_heads, width = query.shape
    groups, block_size = key_cache.shape[1:3]
    acc = torch.promote_types(query.dtype, torch.float32)
    if not num_rows:
        return query.new_empty(query.shape), query.new_empty((num_heads, 0, 2) if columns is not None else 0, dtype=acc)
    rows = torch.arange(num_rows, device=query.device)
    request = torch.searchsorted(cu_seqlens_q[1:], rows, right=True)
    offset = rows - cu_seqlens_q[request]
    place = request * max_seqlen_q + offset
    # Entries after a request's last block may be anything.
    keys_of_table = torch.arange(block_tables.shape[1] * block_size, device=query.device)
    used = keys_of_table.view(-1, block_size)[:, 0] < kv_lengths[:, None]
    tables = torch.where(used, block_tables, 0).long()
    padded = query.new_zeros(len(kv_lengths) * max_seqlen_q, num_heads, width, dtype=acc)
    padded = padded.index_copy(0, place, query.to(acc)).unflatten(0, (-1, max_seqlen_q))
    padded = padded.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [S, g, r, L, d]
    keys, values = (
        cache[tables].to(acc).transpose(1, 2).flatten(2, 3).unsqueeze(2) for cache in (key_cache, value_cache)
    )  # [S, g, 1, W * N, d]
    position = (kv_lengths - cu_seqlens_q.diff())[:, None] + torch.arange(max_seqlen_q, device=query.device)
    seen = keys_of_table <= position[:, :, None]
    seen &= keys_of_table < kv_lengths[:, None, None]
    if visible is not None:
        seen &= visible[tables].flatten(1)[:, None]
    unseen = ~seen[:, None, None]
    # A sum over nothing is 0 / 0, and rows of the cache that nobody wrote may hold anything: both are set to zero.
    values = values.masked_fill(unseen.all(3)[..., None], 0.0)
    weights = (padded @ keys.mT * scale).masked_fill(unseen, float("-inf")).softmax(-1).masked_fill(unseen, 0.0)
    out = (weights @ values).permute(0, 3, 1, 2, 4).flatten(0, 1).index_select(0, place)
    extra = query.new_empty(0, dtype=acc)
    if columns is not None:
        table = columns.to(acc)[: len(keys_of_table)]
        sums = weights[..., : len(table)] @ table  # [S, g, r, L, 2]
        extra = sums.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1, 2).index_select(1, place)
    return out.flatten(1, 2).to(query.dtype).contiguous(), extra.contiguous()
