"""Core attention by ModuleSpec: packed samples, grouped-query heads, rotary positions, a paged cache; CPU and GPU.

Megatron's own needs Transformer Engine for packed samples, and its rotary embedding for them loops over samples in
Python. Ours takes the rotation of each row from the context, computed once for all layers.
"""

from __future__ import annotations

import math
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.attention.columns import with_columns
from parrot_sys.megatron.attention.context import AttentionContext
from parrot_sys.megatron.attention.packed import dense_attention, planned_attention, varlen_attention
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.modules.rotary import rotate, turn
from parrot_sys.parallel import context_attention


class CoreAttention(nn.Module):
    """softmax(scale Q K^T + mask) V for packed samples (`AttentionContext`) or for a dense batch (no context)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if (config.attention_dropout if attention_dropout is None else attention_dropout) > 0:
            raise ConfigError("attention dropout is not supported: set it to 0")
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.context_parallel_size = config.context_parallel_size
        if self.context_parallel_size > 1 and not self.causal:
            raise ConfigError(
                f"context parallelism needs causal attention, got {attn_mask_type.name} with "
                f"context_parallel_size={self.context_parallel_size}: build such layers with context_parallel_size 1"
            )
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
    ) -> Tensor:
        """
        Args:
            query: [s, b, n, d]; key, value: [s, b, g, d]. With a context T = s b, batch entry by batch entry (our own
                decoder has b = 1).
            attention_mask, attention_bias: must be None; the mask follows from `attn_mask_type` of the constructor.
            packed_seq_params: context of a packed micro-batch.

        Returns:
            [s, b, n * d].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ConfigError("CoreAttention takes no attention_mask and no attention_bias")
        context = packed_seq_params
        if self.context_parallel_size > 1 and (context is None or context.shared is None):
            raise ConfigError(
                f"with context_parallel_size={self.context_parallel_size} the rows of a pack are dealt over ranks: "
                "give make_context(..., shared=share_pack(...)) as packed_seq_params"
            )
        if context is None:
            batch_first = (rows.transpose(0, 1) for rows in (query, key, value))
            output = dense_attention(*batch_first, scale=self.scale, causal=self.causal).transpose(0, 1)
            return output.flatten(2)
        batch = query.shape[1]
        query, key, value = (rows.transpose(0, 1).flatten(0, 1) for rows in (query, key, value))
        if context.rotary is not None:
            query, key = rotate(query, *context.rotary), rotate(key, *context.rotary)
        elif context.turns is not None:
            query, key = (turn(rows.unsqueeze(2), *context.turns).squeeze(2) for rows in (query, key))
        return self.packed(query, key, value, context).flatten(1).unflatten(0, (batch, -1)).transpose(0, 1)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
        """Rotated rows of a pack, query [T, n, d], key and value [T, g, d] -> [T, n, d]."""
        if context.paged is not None:
            buffers = context.paged.write(self.layer_number, key, value)
            if not context.paged.fresh:
                return self._from_pages(query, buffers, context, context.paged)
        if context.router is not None:
            return with_columns(query, key, value, context, context.router, self.scale)
        if context.shared is not None:
            return context_attention(query, key, value, context.shared, scale=self.scale)
        if context.plan is None:
            return varlen_attention(
                query, key, value, context.cu_seqlens, context.max_seqlen, scale=self.scale, causal=self.causal
            )
        return planned_attention(query, key, value, context.plan, scale=self.scale, causal=self.causal)

    def _from_pages(
        self, query: Tensor, buffers: tuple[Tensor, Tensor], context: AttentionContext, paged: PagedRows
    ) -> Tensor:
        asked = context.router
        columns = None if asked is None else asked.columns
        bounds, longest = context.cu_seqlens, context.max_seqlen
        output, sums = paged.attend(query, buffers, bounds, longest, scale=self.scale, columns=columns)
        if asked is not None:
            asked.sums = sums
        return output
