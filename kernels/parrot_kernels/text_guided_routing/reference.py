"""Plain PyTorch `text_guided_routing` with a [S, T] mask; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# S images, T text rows, H hidden_size, E experts


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _attention(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention weights [S, T] (zero outside the span) and lse [S]."""
    rows = torch.arange(text.shape[0], device=text.device)
    outside = (rows < text_start[:, None]) | (rows >= text_end[:, None])
    scores = (query @ text.T * scale).masked_fill(outside, float("-inf"))
    # Softmax of an empty span is 0 / 0: its rows are set to zero.
    return scores.softmax(dim=1).masked_fill(outside, 0.0), scores.logsumexp(dim=1)


def text_guided_routing_fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    acc = torch.promote_types(query.dtype, torch.float32)
    query, text, router_weight = query.to(acc), text.to(acc), router_weight.to(acc)
    attention, lse = _attention(query, text, text_start, text_end, scale)
    return attention @ (text @ router_weight.T), lse


def text_guided_routing_bwd(
    grad_logits: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    lse: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype, acc = query.dtype, logits.dtype
    query, text, router_weight = query.to(acc), text.to(acc), router_weight.to(acc)
    attention, _ = _attention(query, text, text_start, text_end, scale)
    needs_query, needs_text, needs_router_weight = needs
    none = text.new_empty(0, dtype=dtype)  # cloned for each use: outputs of an op must not alias

    grad_projected = attention.T @ grad_logits  # [T, E]
    grad_attention = grad_logits @ (text @ router_weight.T).T
    # This sum is logits . grad_logits as well, but then its rounding would not cancel that of the attention.
    delta = (attention * grad_attention).sum(dim=1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[:, None]
    grad_scores = attention * (grad_attention - delta) * scale
    return (
        (grad_scores @ text).to(dtype) if needs_query else none.clone(),
        (grad_projected @ router_weight + grad_scores.T @ query).to(dtype) if needs_text else none.clone(),
        (grad_projected.T @ text).to(dtype) if needs_router_weight else none.clone(),
    )
