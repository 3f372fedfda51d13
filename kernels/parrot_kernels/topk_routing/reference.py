"""Plain PyTorch `topk_routing`; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# n rows, E experts, K topk


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def topk_routing_fwd(
    logits: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_experts = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = logits.logsumexp(dim=1)
    scores = logits.softmax(dim=1)
    # A stable sort, not topk: only it promises the smaller index first among equal logits.
    topk_indices = logits.sort(dim=1, descending=True, stable=True).indices[:, :topk].contiguous()
    chosen = scores.gather(1, topk_indices)
    if renormalize:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    probs = torch.zeros_like(scores).scatter(1, topk_indices, chosen)
    flat = topk_indices.flatten()
    plan = flat.argsort(stable=True)
    chosen_map = torch.zeros_like(scores, dtype=torch.int32).scatter(1, topk_indices, 1)
    tokens_per_expert = chosen_map.sum(0, dtype=torch.int32)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=logits.device)
    expert_offsets[1:] = tokens_per_expert.cumsum(0)
    return probs, scores, lse, topk_indices, tokens_per_expert, expert_offsets, plan


def topk_routing_bwd(
    grad_probs: Tensor | None,
    grad_scores: Tensor | None,
    grad_lse: Tensor | None,
    probs: Tensor,
    scores: Tensor,
    topk_indices: Tensor,
    renormalize: bool,
) -> Tensor:
    """See the contract in the package docstring."""
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores
    if grad_probs is not None:
        # The index tells what was chosen: a chosen probability may itself have underflowed to zero.
        chosen = grad_probs.gather(1, topk_indices)
        if renormalize:
            weights = probs.gather(1, topk_indices)
            total = scores.gather(1, topk_indices).sum(dim=1, keepdim=True)
            chosen = (chosen - (weights * chosen).sum(dim=1, keepdim=True)) / total
        grad = grad.scatter_add(1, topk_indices, chosen)
    grad_logits = scores * (grad - (scores * grad).sum(dim=1, keepdim=True))
    return grad_logits if grad_lse is None else grad_logits + grad_lse[:, None] * scores
