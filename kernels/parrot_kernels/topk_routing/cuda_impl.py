"""CUDA `topk_routing` for Hopper: one launch for up to 256 rows, else three; backward one (csrc/cuda/topk_routing*)."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import cuda_support

# n rows, E experts, K topk

MAX_EXPERTS = 512
MAX_GROUPS = 32


def why_not(*args: object) -> str | None:
    """Needs Hopper, at most 512 experts in at most 32 groups, and fewer than 2^31 choices."""
    if reason := cuda_support.why_not(*args[:1]):
        return reason
    if not args:
        return None
    logits, topk, *options = args
    assert isinstance(logits, Tensor)
    assert isinstance(topk, int)
    num_rows, num_experts = logits.shape
    if num_experts > MAX_EXPERTS:
        return f"it takes at most {MAX_EXPERTS} experts, got {num_experts}"
    num_groups = options[3] if len(options) > 3 else 1
    assert isinstance(num_groups, int)
    if num_groups > MAX_GROUPS:
        return f"it takes at most {MAX_GROUPS} groups of experts, got {num_groups}"
    if num_rows * topk >= 2**31:
        return f"it counts fewer than 2^31 choices, got {num_rows * topk}"
    return None


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
    bias = None if expert_bias is None else expert_bias.float().contiguous()
    options = (renormalize, score_function == "sigmoid", scaling_factor, num_groups, topk_groups, bias)
    return torch.ops.parrot_ext.topk_routing_cuda_fwd(logits.contiguous(), topk, *options)


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
    grads = (grad_probs, grad_scores, grad_lse, grad_score_sums, grad_z_sum)
    return torch.ops.parrot_ext.topk_routing_cuda_bwd(
        *(None if grad is None else grad.contiguous() for grad in grads),
        logits.contiguous(),
        topk_indices,
        renormalize,
        score_function == "sigmoid",
        scaling_factor,
    )
