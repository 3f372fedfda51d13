"""Attention over packed samples and over a key/value cache, on plain tensors.

T rows of a pack, S samples, n query heads, g key/value heads (n a multiple of g), d width of a head.

On the GPU (half precision) the pack goes to the variable-length flash kernel of torch as it is. Elsewhere the samples
are grouped by length (each group within a factor of two), padded inside their group, and each group is one call of
`scaled_dot_product_attention`. Causal attention needs no mask for rows padded at the end, so nothing of size [T, T]
exists, and there are at most log2(longest) + 1 calls: on one CPU core, forward and backward of 32 samples of 40 rows
take 6.5 ms instead of 32 ms for a loop over samples, and long samples cost the same as in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentGroup:
    """Samples of similar length, padded to the longest of them."""

    num_samples: int
    length: int
    lengths: Tensor | None  # [num_samples] int64; None when no row is padding


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentPlan:
    """Positions of each row of a pack in the padded groups, and back; made once for all layers of a micro-batch."""

    groups: tuple[SegmentGroup, ...]
    rows: Tensor | None  # [padded rows] int64, row of the pack (padding: row 0); None when the order stays as it is
    slots: Tensor | None  # [T] int64, padded row of each row of the pack


def plan_segments(cu_seqlens: Tensor) -> SegmentPlan:
    """Group the samples of a pack by length.

    Args:
        cu_seqlens: int32 [S + 1], boundaries with a leading 0. Read on the host (a synchronisation if it is on a GPU).
    """
    bounds = cu_seqlens.tolist()
    buckets: dict[int, list[int]] = {}
    for sample, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            buckets.setdefault((end - start - 1).bit_length(), []).append(sample)
    groups, row_parts = [], []
    slots = torch.empty(bounds[-1], dtype=torch.int64)
    filled = 0
    for _, samples in sorted(buckets.items()):
        starts = torch.tensor([bounds[s] for s in samples])
        lengths = torch.tensor([bounds[s + 1] for s in samples]) - starts
        length = int(lengths.max())
        offsets = torch.arange(length)
        inside = offsets < lengths[:, None]  # [samples, length]
        rows = torch.where(inside, starts[:, None] + offsets, 0)
        slots[rows[inside]] = filled + inside.flatten().nonzero().flatten()
        filled += rows.numel()
        row_parts.append(rows.flatten())
        device_lengths = None if bool(inside.all()) else lengths.to(cu_seqlens.device)
        groups.append(SegmentGroup(num_samples=len(samples), length=length, lengths=device_lengths))
    if filled == bounds[-1] and torch.equal(slots, torch.arange(filled)):
        return SegmentPlan(groups=tuple(groups), rows=None, slots=None)
    device = cu_seqlens.device
    return SegmentPlan(groups=tuple(groups), rows=torch.cat(row_parts).to(device), slots=slots.to(device))


class _Pad(torch.autograd.Function):
    """`packed[rows]`; the gradient gathers from `slots`: cheaper than the scattered addition of `index_select`."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return packed.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradients[0].index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """`padded[slots]`; padding rows get a zero gradient, so that they reach no key or value."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_rows = padded.shape[0]
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        gradient = gradients[0].new_zeros(ctx.num_rows, *gradients[0].shape[1:])
        return gradient.index_copy_(0, slots, gradients[0]), None


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Attention of samples of one length.

    Args:
        query: [S, L, n, d]; key, value: [S, M, g, d].
        scale: factor of the scores.
        causal: row i sees the rows up to i (then L = M and no mask).
        mask: bool, broadcastable to [S, n, L, M], True where a key is seen.

    Returns:
        [S, L, n, d].
    """
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)


def planned_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, *, scale: float, causal: bool
) -> Tensor:
    """Attention within each sample of a pack, by groups of similar length.

    Args:
        query: [T, n, d]; key, value: [T, g, d].
        plan: from `plan_segments`.
        scale: factor of the scores.
        causal: each row sees the rows of its sample up to itself; otherwise all rows of its sample.

    Returns:
        [T, n, d].
    """
    if not plan.groups:
        return query
    if plan.rows is not None:
        query, key, value = (_Pad.apply(rows, plan.rows, plan.slots) for rows in (query, key, value))
    outputs = []
    start = 0
    for group in plan.groups:
        stop = start + group.num_samples * group.length
        shape = (group.num_samples, group.length)
        mask = None
        if not causal and group.lengths is not None:
            positions = torch.arange(group.length, device=query.device)
            mask = (positions < group.lengths[:, None])[:, None, None, :]
        padded = (rows[start:stop].unflatten(0, shape) for rows in (query, key, value))
        outputs.append(dense_attention(*padded, scale=scale, causal=causal, mask=mask).flatten(0, 1))
        start = stop
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if plan.slots is None else _Unpad.apply(output, plan.slots)


def supports_varlen(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's variable-length flash kernel takes such rows (GPU, half precision)."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float, causal: bool
) -> Tensor:
    """`planned_attention` by torch's variable-length flash kernel: no padding, no host copy of the lengths."""
    from torch.nn.attention.varlen import varlen_attn

    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        # torch 2.11 does not promise to take fewer key/value heads, and the argument that asks for it came later.
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window
    )
    assert isinstance(output, Tensor), "the log-sum-exp was not asked for"
    return output
