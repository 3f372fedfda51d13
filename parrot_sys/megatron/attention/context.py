"""State that the attention layers of a micro-batch share: bounds of its samples, rotations, caches, memories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.attention.packed import SegmentPlan, plan_segments, supports_varlen
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.parallel import SharedPack


@dataclass(kw_only=True)
class ColumnSum:
    """Asks a layer's attention for its weights, summed over the heads of this rank, times two columns.

    `columns[p]` belongs to the key at position p of its sample; `sums` is the answer (see `router_attention`).
    """

    columns: Tensor  # [P, 2], P at least the longest sample
    sums: Tensor | None = None  # [T, 2] float32


@dataclass(kw_only=True)
class AttentionContext(PackedSeqParams):
    """Facts about a packed micro-batch that every attention layer needs; handed down as `packed_seq_params`.

    `qkv_format` stays unset: Megatron then keeps the pack as [T, 1, n, d] and leaves the rotation to us.
    """

    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    plan: SegmentPlan | None  # None where it is not needed
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, [T, 1, d / 2] each
    turns: tuple[Tensor, Tensor] | None = None  # in its place, for `turn`: in steps over a paged cache
    paged: PagedRows | None = None  # rows of requests whose keys and values are in a paged cache
    shared: SharedPack | None = None  # the pack is dealt over context-parallel ranks; the rows here are this rank's
    memory: MemoryPlan | None = None  # who sees what of the memory that layers get as `context`
    router: ColumnSum | None = None  # set by layers whose router reads their attention
    positions: Tensor | None = None  # [T] int64, place of each row in its sample


def make_context(
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dtype: torch.dtype,
    rotary: tuple[Tensor, Tensor] | None = None,
    turns: tuple[Tensor, Tensor] | None = None,
    paged: PagedRows | None = None,
    shared: SharedPack | None = None,
    memory: MemoryPlan | None = None,
    positions: Tensor | None = None,
) -> AttentionContext:
    """Everything about a micro-batch that its attention layers share, computed once.

    Args:
        cu_seqlens: int32 [S + 1].
        max_seqlen: longest sample.
        dtype: of queries, keys and values.
        rotary: from `rotary_cos_sin`.
        turns: from `turning`, in the place of `rotary`.
        paged: rows of requests whose keys and values are in a paged cache.
        shared: from `share_pack` under context parallelism.
        memory: for layers that read one, with the padded pack's rows of this rank.
        positions: int64 [T], place of each row in its sample; for `ColumnSum` under context parallelism.
    """
    varlen = supports_varlen(dtype, cu_seqlens.device)
    planned = not (varlen or (paged is not None and not paged.fresh) or shared is not None)
    return AttentionContext(
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        plan=plan_segments(cu_seqlens) if planned else None,
        rotary=rotary,
        turns=turns,
        shared=shared,
        memory=memory,
        positions=positions,
        paged=paged,
    )
