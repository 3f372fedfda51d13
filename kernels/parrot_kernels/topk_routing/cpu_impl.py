"""CPU `topk_routing`: one C++ loop over rows and a counting sort, in place of a dozen small torch calls."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension


def why_not(*args: object) -> str | None:
    """Needs the C++ extension and CPU logits of at most 32 bits."""
    if reason := _extension.why_not():
        return reason
    if args and isinstance(logits := args[0], Tensor):
        if logits.device.type != "cpu":
            return f"it needs CPU tensors, got {logits.device.type}"
        if logits.dtype == torch.float64:
            return "it computes in float32, got float64"
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
    logits, bias = logits.float().contiguous(), None if expert_bias is None else expert_bias.float().contiguous()
    options = (renormalize, score_function == "sigmoid", scaling_factor, num_groups, topk_groups, bias)
    return torch.ops.parrot_ext.topk_routing_fwd(logits, topk, *options)


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
    grad_logits = torch.ops.parrot_ext.topk_routing_bwd(
        *(None if grad is None else grad.contiguous() for grad in grads),
        logits.float().contiguous(),
        topk_indices,
        renormalize,
        score_function == "sigmoid",
        scaling_factor,
    )
    return grad_logits.to(logits.dtype)
