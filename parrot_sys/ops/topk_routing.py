"""`topk_routing`: scores, the K best experts of each row, statistics, and the plan that groups rows by expert."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype
from parrot_sys.ops._operator import operator

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class TopKRouting(NamedTuple):
    """Route of n rows over E experts with K chosen each; floats are float32 (float64 for float64 logits)."""

    probs: Tensor  # [n, E], weights of the chosen experts, zeros elsewhere
    scores: Tensor  # [n, E], softmax or sigmoid over all experts
    lse: Tensor  # [n], log-sum-exp of the logits
    score_sums: Tensor  # [E], sum over the rows of the scores (of each row's shares, for sigmoid scores)
    z_sum: Tensor  # [], sum over the rows of lse squared
    topk_indices: Tensor  # [n, K] int64, best first; of equal logits the smaller index
    tokens_per_expert: Tensor  # [E] int32
    expert_offsets: Tensor  # [E + 1] int32, leading 0
    plan: Tensor  # [n * K] int64, positions row * K + slot sorted by expert


@operator("topk_routing")
def _fwd(
    logits: Tensor,
    topk: int,
    renormalize: bool,
    score_function: str,
    scaling_factor: float,
    num_groups: int,
    topk_groups: int,
    expert_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (logits, topk, renormalize, score_function, scaling_factor, num_groups, topk_groups, expert_bias)
    return registry.select("topk_routing", *args).topk_routing_fwd(*args)


@_fwd.register_fake
def _(logits: Tensor, topk: int, *_: Any) -> _Outputs:
    rows, num_experts = logits.shape
    dtype = accumulate_dtype(logits.dtype)
    return (
        logits.new_empty((rows, num_experts), dtype=dtype),
        logits.new_empty((rows, num_experts), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(num_experts, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((rows, topk), dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts + 1, dtype=torch.int32),
        logits.new_empty(rows * topk, dtype=torch.int64),
    )


@operator("topk_routing_bwd")
def _bwd(
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
    grads = (grad_probs, grad_scores, grad_lse, grad_score_sums, grad_z_sum)
    options = (renormalize, score_function, scaling_factor)
    impl = registry.select("topk_routing", logits, topk_indices.shape[1], *options)
    return impl.topk_routing_bwd(*grads, logits, topk_indices, *options)


@_bwd.register_fake
def _(*args: Any) -> Tensor:
    return args[5].new_empty(args[5].shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.renormalize, ctx.score_function, ctx.scaling_factor, *_ = inputs
    topk_indices = output[5]
    ctx.save_for_backward(logits, topk_indices)
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    options = (ctx.renormalize, ctx.score_function, ctx.scaling_factor)
    return _bwd(*grads[:5], *ctx.saved_tensors, *options), *(None,) * 7


_fwd.register_autograd(_backward, setup_context=_setup_context)


def topk_routing(
    logits: Tensor,
    topk: int,
    *,
    renormalize: bool,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    expert_bias: Tensor | None = None,
) -> TopKRouting:
    """Route each row to its `topk` best experts.

    The exact rules (ties, groups, statistics) are in `parrot_kernels.topk_routing`. DeepSeek-V3's router is
    `score_function="sigmoid", num_groups=8, topk_groups=4, renormalize=True, scaling_factor=2.5` with an `expert_bias`.

    Args:
        logits: [n, E] float; n may be 0.
        topk: K in [1, E]; K = E chooses all.
        renormalize: divide the chosen weights by their sum.
        score_function: what turns logits into scores.
        scaling_factor: factor of the chosen weights.
        num_groups: groups of neighbouring experts, a divisor of E.
        topk_groups: how many groups a row may choose experts from.
        expert_bias: [E], added to the scores for the selection only (DeepSeek-V3's balancing without a loss).

    Raises:
        ValueError: topk, num_groups, topk_groups or score_function out of range.
    """
    num_experts = logits.shape[1]
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function must be 'softmax' or 'sigmoid', got {score_function!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups must be in [1, num_groups={num_groups}], got {topk_groups}")
    allowed = num_experts // num_groups * topk_groups
    if not 1 <= topk <= allowed:
        what = f"num_experts={num_experts}" if num_groups == 1 else f"experts of {topk_groups} groups={allowed}"
        raise ValueError(f"topk must be in [1, {what}], got {topk}")
    options = (renormalize, score_function, scaling_factor, num_groups, topk_groups, expert_bias)
    return TopKRouting(*_fwd(logits, topk, *options))
