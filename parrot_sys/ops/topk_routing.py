"""`topk_routing`: softmax scores, the K best experts of each row, and the plan that groups rows by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype


class TopKRouting(NamedTuple):
    """Route of n rows over E experts with K chosen each; floats are float32 (float64 for float64 logits)."""

    probs: Tensor  # [n, E], weights of the chosen experts, zeros elsewhere
    scores: Tensor  # [n, E], softmax over all experts
    lse: Tensor  # [n], log-sum-exp of the logits
    topk_indices: Tensor  # [n, K] int64, best first; of equal logits the smaller index
    tokens_per_expert: Tensor  # [E] int32
    expert_offsets: Tensor  # [E + 1] int32, leading 0
    plan: Tensor  # [n * K] int64, positions row * K + slot sorted by expert


@torch.library.custom_op("parrot::topk_routing", mutates_args=())
def _fwd(logits: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return registry.select("topk_routing", logits, topk, renormalize).topk_routing_fwd(logits, topk, renormalize)


@_fwd.register_fake
def _(logits: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, num_experts = logits.shape
    dtype = accumulate_dtype(logits.dtype)
    return (
        logits.new_empty((rows, num_experts), dtype=dtype),
        logits.new_empty((rows, num_experts), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((rows, topk), dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts + 1, dtype=torch.int32),
        logits.new_empty(rows * topk, dtype=torch.int64),
    )


@torch.library.custom_op("parrot::topk_routing_bwd", mutates_args=())
def _bwd(
    grad_probs: Tensor | None,
    grad_scores: Tensor | None,
    grad_lse: Tensor | None,
    probs: Tensor,
    scores: Tensor,
    topk_indices: Tensor,
    renormalize: bool,
) -> Tensor:
    impl = registry.select("topk_routing", scores, topk_indices.shape[1], renormalize)
    return impl.topk_routing_bwd(grad_probs, grad_scores, grad_lse, probs, scores, topk_indices, renormalize)


@_bwd.register_fake
def _(
    grad_probs: Tensor | None,
    grad_scores: Tensor | None,
    grad_lse: Tensor | None,
    probs: Tensor,
    scores: Tensor,
    topk_indices: Tensor,
    renormalize: bool,
) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.renormalize = inputs
    probs, scores, _, topk_indices, *_ = output
    ctx.dtype = logits.dtype
    ctx.save_for_backward(probs, scores, topk_indices)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
    return _bwd(*grads[:3], *ctx.saved_tensors, ctx.renormalize).to(ctx.dtype), None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def topk_routing(logits: Tensor, topk: int, *, renormalize: bool) -> TopKRouting:
    """Route each row to its `topk` best experts by softmax score.

    Args:
        logits: [n, E] float; n may be 0.
        topk: K in [1, E]; K = E chooses all, and probs equal scores then.
        renormalize: divide the chosen weights by their sum.

    Raises:
        ValueError: topk out of range.
    """
    if not 1 <= topk <= logits.shape[1]:
        raise ValueError(f"topk must be in [1, num_experts={logits.shape[1]}], got {topk}")
    return TopKRouting(*_fwd(logits, topk, renormalize))
