"""Plain PyTorch `topk_routing`; any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

# n rows, E experts, K topk

EPSILON = 1e-20  # keeps sums of scores that all underflowed from dividing by zero, as Megatron-Core


def why_not(*args: object) -> str | None:
    """The reference runs everywhere."""
    return None


def _scores(logits: Tensor, score_function: str) -> Tensor:
    return logits.softmax(dim=1) if score_function == "softmax" else logits.sigmoid()


def _allowed(values: Tensor, topk: int, num_groups: int, topk_groups: int) -> Tensor:
    """[n, E] bool: experts of the best groups."""
    groups = values.unflatten(1, (num_groups, -1))
    best = groups.sort(dim=2, descending=True).values[:, :, : max(1, topk // topk_groups)].sum(dim=2)
    chosen = best.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups]
    mask = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
    return mask[:, :, None].expand_as(groups).flatten(1)


def topk_routing_fwd(
    logits: Tensor,
    topk: int,
    renormalize: bool,
    score_function: str = "softmax",
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_experts = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = logits.logsumexp(dim=1)
    scores = _scores(logits, score_function)
    keys = logits if expert_bias is None else scores + expert_bias.to(scores.dtype)
    order = keys.sort(dim=1, descending=True, stable=True).indices  # only a stable sort promises the smaller index
    if num_groups > 1:
        by_logit = expert_bias is None and score_function == "softmax" and renormalize
        values = scores if expert_bias is None and not by_logit else keys
        allowed = _allowed(values, topk, num_groups, topk_groups).gather(1, order)
        # The allowed ones first, in their order.
        order = order.gather(1, allowed.int().sort(dim=1, descending=True, stable=True).indices)
    topk_indices = order[:, :topk].contiguous()

    chosen = scores.gather(1, topk_indices)
    if renormalize:
        chosen = chosen / (chosen.sum(dim=1, keepdim=True) + EPSILON)
    probs = torch.zeros_like(scores).scatter(1, topk_indices, chosen * scaling_factor)
    shares = scores if score_function == "softmax" else scores / (scores.sum(dim=1, keepdim=True) + EPSILON)

    chosen_map = torch.zeros_like(scores, dtype=torch.int32).scatter(1, topk_indices, 1)
    tokens_per_expert = chosen_map.sum(0, dtype=torch.int32)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=logits.device)
    expert_offsets[1:] = tokens_per_expert.cumsum(0)
    plan = topk_indices.flatten().argsort(stable=True)
    statistics = shares.sum(dim=0), lse.square().sum()
    return probs, scores, lse, *statistics, topk_indices, tokens_per_expert, expert_offsets, plan


def topk_routing_bwd(
    grad_probs: Tensor | None,
    grad_scores: Tensor | None,
    grad_lse: Tensor | None,
    grad_score_sums: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    topk_indices: Tensor,
    renormalize: bool,
    score_function: str,
    scaling_factor: float,
) -> Tensor:
    """See the contract in the package docstring."""
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    scores = _scores(logits, score_function)
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores
    if grad_probs is not None:
        # The index tells what was chosen: a chosen probability may itself have underflowed to zero.
        grad_chosen = grad_probs.gather(1, topk_indices) * scaling_factor
        if renormalize:
            grad_chosen = _through_division(grad_chosen, scores.gather(1, topk_indices))
        grad = grad.scatter_add(1, topk_indices, grad_chosen)
    if grad_score_sums is not None:
        grad_shares = grad_score_sums.expand_as(scores)
        grad = grad + (grad_shares if score_function == "softmax" else _through_division(grad_shares, scores))
    if score_function == "softmax":
        grad_logits = scores * (grad - (scores * grad).sum(dim=1, keepdim=True))
    else:
        grad_logits = scores * (1 - scores) * grad
    if grad_z_sum is not None:
        grad_z = 2 * logits.logsumexp(dim=1) * grad_z_sum
        grad_lse = grad_z if grad_lse is None else grad_lse + grad_z
    if grad_lse is not None:
        grad_logits = grad_logits + grad_lse[:, None] * logits.softmax(dim=1)
    return grad_logits.to(dtype)


def _through_division(grad: Tensor, values: Tensor) -> Tensor:
    """Gradient of `values` from that of `values / (their sum + EPSILON)` along the last dimension."""
    total = values.sum(dim=1, keepdim=True) + EPSILON
    return (grad - (values / total * grad).sum(dim=1, keepdim=True)) / total
