"""Causal attention over the samples of a pack whose rows are dealt over ranks (context parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.ops import segment_attention
from parrot_sys.parallel.collectives import all_gather_single, reduce_scatter_single
from parrot_sys.parallel.row_split import RowSplit

# T' rows of the padded pack, M of them on this rank; n query heads, g key/value heads, d width of a head


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPack:
    """A pack that the ranks of a group share, and what each row of this rank sees of it; the same for all layers."""

    split: RowSplit
    group: ProcessGroup
    kv_start: Tensor  # [M] int32, first row of the sample of each row
    kv_end: Tensor  # [M] int32, one past the row itself


def share_pack(split: RowSplit, group: ProcessGroup, cu_seqlens: Tensor) -> SharedPack:
    """Describes a pack for `context_attention`, without looking at the device.

    Args:
        split: how its rows are dealt.
        group: the ranks.
        cu_seqlens: int32 [S + 1] of the padded pack: the padding is a sample of its own.
    """
    rows = torch.arange(split.size * split.local_rows, dtype=torch.int32, device=cu_seqlens.device)
    rows = split.take(rows, group.rank())
    # Of equal boundaries (empty samples) the last one owns the row.
    sample = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    return SharedPack(split=split, group=group, kv_start=cu_seqlens[sample], kv_end=rows + 1)


def context_attention(query: Tensor, key: Tensor, value: Tensor, pack: SharedPack, *, scale: float) -> Tensor:
    """Each row of this rank attends to the rows of its sample up to itself, on whichever rank they are.

    The keys and values of all ranks are gathered, in the forward pass and again in the backward pass: between the two
    only this rank's own are kept. Their gradients are summed and dealt back to the ranks.

    Args:
        query: [M, n, d], rows of this rank, rotated to their places in their samples.
        key: [M, g, d], n a multiple of g.
        value: [M, g, d].
        pack: from `share_pack`.
        scale: factor of the scores.

    Returns:
        [M, n, d].
    """
    return _ContextAttention.apply(query, torch.stack((key, value), dim=1), pack, scale)


def _gather(key_value: Tensor, pack: SharedPack) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole pack, [T', g, d] each, from [M, 2, g, d] of each rank: one message for both."""
    by_rank = key_value.new_empty(pack.split.size * key_value.shape[0], *key_value.shape[1:])
    all_gather_single(by_rank, key_value.contiguous(), group=pack.group)
    key, value = pack.split.join(by_rank).unbind(1)
    return key, value


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, pack: SharedPack, scale: float) -> Tensor:
        out, lse = segment_attention(query, *_gather(key_value, pack), pack.kv_start, pack.kv_end, scale=scale)
        ctx.save_for_backward(query, key_value, out, lse)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, key_value, out, lse = ctx.saved_tensors
        pack: SharedPack = ctx.pack
        needs_query, needs_key_value = ctx.needs_input_grad[:2]
        grad_query, grad_key, grad_value = torch.ops.parrot.segment_attention_bwd(
            grads[0],
            None,
            query,
            *_gather(key_value, pack),
            pack.kv_start,
            pack.kv_end,
            out,
            lse,
            ctx.scale,
            [needs_query, needs_key_value, needs_key_value],
        )
        grad_key_value = None
        if needs_key_value:
            by_rank = pack.split.deal(torch.stack((grad_key, grad_value), dim=1))
            grad_key_value = torch.empty_like(key_value)
            reduce_scatter_single(grad_key_value, by_rank.contiguous(), group=pack.group)
        return (grad_query if needs_query else None), grad_key_value, None, None
