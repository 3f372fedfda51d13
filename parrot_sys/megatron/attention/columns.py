"""Attention that also tells its weights, summed over heads, times two columns: what a router reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parrot_sys.megatron.attention.context import AttentionContext, ColumnSum
from parrot_sys.ops import router_attention
from parrot_sys.parallel import context_attention


def with_columns(
    query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, asked: ColumnSum, scale: float
) -> Tensor:
    """Causal attention of a pack that also answers a `ColumnSum`.

    Args:
        query: [T, n, d], rotated; key, value: [T, g, d].
        context: of the micro-batch.
        asked: gets its `sums`.
        scale: factor of the scores.

    Returns:
        [T, n, d].
    """
    if context.shared is not None:
        assert context.positions is not None, "the decoder gives them"
        # The columns of a row's position travel with its value; keys are no wider for it.
        own = asked.columns.index_select(0, context.positions).to(value.dtype)[:, None].expand(-1, value.shape[1], 2)
        wide = (F.pad(query, (0, 2)), F.pad(key, (0, 2)), torch.cat((value, own), dim=-1))
        output = context_attention(*wide, context.shared, scale=scale)
        asked.sums = output[..., -2:].float().sum(1)
        return output[..., :-2]
    lengths, longest = (context.cu_seqlens, context.cu_seqlens), context.max_seqlen
    output, asked.sums, _ = router_attention(
        query, key, value, asked.columns, *lengths, max_seqlen_q=longest, max_seqlen_kv=longest, scale=scale
    )
    return output
