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
    logits: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    return torch.ops.parrot_ext.topk_routing_fwd(logits.float().contiguous(), topk, renormalize)


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
    grads = [None if grad is None else grad.contiguous() for grad in (grad_probs, grad_scores, grad_lse)]
    return torch.ops.parrot_ext.topk_routing_bwd(*grads, probs, scores, topk_indices, renormalize)
