"""`linear_cross_entropy`: LM head and cross entropy over label rows without the [L, vocabulary] logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator


@operator("linear_cross_entropy")
def _fwd(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    args = (hidden, weight, targets, vocab_start)
    return registry.select("linear_cross_entropy", *args).linear_cross_entropy_fwd(*args)


@_fwd.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@operator("linear_cross_entropy_bwd")
def _bwd(
    grad_lse: Tensor,
    grad_target_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_start: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    impl = registry.select("linear_cross_entropy", hidden, weight, targets, vocab_start)
    return impl.linear_cross_entropy_bwd(
        grad_lse, grad_target_logits, hidden, weight, targets, lse, vocab_start, tuple(needs)
    )


@_bwd.register_fake
def _(
    grad_lse: Tensor,
    grad_target_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_start: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return like_or_empty(hidden, needs[0]), like_or_empty(weight, needs[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.vocab_start = inputs
    ctx.save_for_backward(hidden, weight, targets, output[0])


def _backward(ctx: Any, grad_lse: Tensor, grad_target_logits: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = _bwd(grad_lse, grad_target_logits, hidden, weight, targets, lse, ctx.vocab_start, needs)
    return *map(or_none, grads, needs), None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy_parts(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_start: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits and the logit of each target, over the rows of the vocabulary held in `weight`.

    Args:
        hidden: [L, H] float; L may be 0.
        weight: [N, H], dtype of `hidden`; frozen weights cost no gradient.
        targets: [L] int64, global token ids.
        vocab_start: global id of `weight[0]`.

    Returns:
        lse [L] and target_logits [L] (0 where the target is not among these rows), float32 (float64 for float64
        inputs); both differentiable.
    """
    return _fwd(hidden, weight, targets, vocab_start)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `targets`, one loss a row, [L] float32 (float64 for float64 inputs).

    At most one block of logits exists at a time, in both passes. Rows whose target is `ignore_index` have the loss 0
    and no gradients; they cost as much as others, so that whoever has many of them should select the others before.
    Arguments as `linear_cross_entropy_parts`; the form for a vocabulary split over ranks is
    `parrot_sys.parallel.vocab_parallel_linear_cross_entropy`.
    """
    lse, target_logits = _fwd(hidden, weight, targets, 0)
    return (lse - target_logits).masked_fill(targets == ignore_index, 0.0)
