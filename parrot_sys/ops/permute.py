"""`permute` and `unpermute`: rows into the order of a dispatch plan, and back with their weighted sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator

# T rows, K topk, R places in the plan, W columns


@operator("permute")
def _permute_fwd(x: Tensor, probs: Tensor | None, plan: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    return registry.select("permute", x, probs, plan, topk).permute_fwd(x, probs, plan, topk)


@_permute_fwd.register_fake
def _(x: Tensor, probs: Tensor | None, plan: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    row_probs = x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if probs is None else probs.new_empty(len(plan))
    return x.new_empty(len(plan), x.shape[1]), row_probs


@operator("permute_bwd")
def _permute_bwd(
    grad_rows: Tensor | None, grad_row_probs: Tensor | None, plan: Tensor, topk: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    impl = registry.select("permute", grad_rows, grad_row_probs, plan, topk)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_rows, grad_row_probs)]
    return impl.permute_bwd(*grads, plan, topk, num_rows)


@_permute_bwd.register_fake
def _(
    grad_rows: Tensor | None, grad_row_probs: Tensor | None, plan: Tensor, topk: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    none = plan.new_empty(0, dtype=torch.float32)
    return (
        none if grad_rows is None else grad_rows.new_empty(num_rows, grad_rows.shape[1]),
        none.clone() if grad_row_probs is None else grad_row_probs.new_empty(num_rows, topk),
    )


def _permute_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, plan, ctx.topk = inputs
    ctx.num_rows = len(x)
    ctx.save_for_backward(plan)
    ctx.set_materialize_grads(False)


def _permute_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    results = _permute_bwd(*wanted, *ctx.saved_tensors, ctx.topk, ctx.num_rows)
    return *(or_none(result, grad is not None) for result, grad in zip(results, wanted, strict=True)), None, None


_permute_fwd.register_autograd(_permute_backward, setup_context=_permute_context)


@operator("unpermute")
def _unpermute_fwd(rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, num_rows: int) -> Tensor:
    return registry.select("permute", rows, probs, plan, topk).unpermute_fwd(rows, probs, plan, topk, num_rows)


@_unpermute_fwd.register_fake
def _(rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, num_rows: int) -> Tensor:
    return rows.new_empty(num_rows, rows.shape[1])


@operator("unpermute_bwd")
def _unpermute_bwd(
    grad: Tensor, rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    impl = registry.select("permute", rows, probs, plan, topk)
    needs_rows, needs_probs = needs
    return impl.unpermute_bwd(grad.contiguous(), rows, probs, plan, topk, (needs_rows, needs_probs))


@_unpermute_bwd.register_fake
def _(
    grad: Tensor, rows: Tensor, probs: Tensor | None, plan: Tensor, topk: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    none = rows.new_empty(0, dtype=accumulate_dtype(rows.dtype))
    return like_or_empty(rows, needs[0]), none if probs is None else like_or_empty(probs, needs[1])


def _unpermute_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, probs, plan, ctx.topk, _ = inputs
    ctx.save_for_backward(rows, probs, plan)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = _unpermute_bwd(grad, *ctx.saved_tensors, ctx.topk, needs)
    return *map(or_none, grads, needs), None, None, None


_unpermute_fwd.register_autograd(_unpermute_backward, setup_context=_unpermute_context)


def permute(x: Tensor, plan: Tensor, *, topk: int, probs: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Copies of the rows of `x`, sorted by expert: `rows[j] = x[plan[j] // topk]`.

    Args:
        x: [T, ...] float.
        plan: [R] int64, R <= T * K positions `row * topk + choice`, as in `TopKRouting.plan`; all different.
        topk: K.
        probs: [T, K] float32 (float64 for float64 `x`), to be sorted along with the rows.

    Returns:
        rows [R, ...], and probabilities [R] or None.

    Raises:
        ValueError: `probs` has another shape.
    """
    _check_probs(probs, len(x), topk)
    rows, row_probs = _permute_fwd(
        x.flatten(1).contiguous(), None if probs is None else probs.contiguous(), plan.contiguous(), topk
    )
    return rows.view(len(plan), *x.shape[1:]), None if probs is None else row_probs


def unpermute(rows: Tensor, plan: Tensor, *, topk: int, num_rows: int, probs: Tensor | None = None) -> Tensor:
    """The reverse of `permute`: each row is the sum, weighted with `probs`, of its K places.

    Args:
        rows: [R, ...] float, in the order of the plan.
        plan: as for `permute`; positions that it lacks contribute nothing.
        topk: K.
        num_rows: T.
        probs: [T, K] float32 (float64 for float64 `rows`), or None for a plain sum.

    Returns:
        [T, ...], dtype of `rows`.

    Raises:
        ValueError: `probs` or `rows` has another shape.
    """
    _check_probs(probs, num_rows, topk)
    if len(rows) != len(plan):
        raise ValueError(f"rows must have one row for each of the plan's {len(plan)} places, got {len(rows)}")
    weights = None if probs is None else probs.contiguous()
    y = _unpermute_fwd(rows.flatten(1).contiguous(), weights, plan.contiguous(), topk, num_rows)
    return y.view(num_rows, *rows.shape[1:])


def _check_probs(probs: Tensor | None, num_rows: int, topk: int) -> None:
    if probs is not None and probs.shape != (num_rows, topk):
        raise ValueError(f"probs must be [num_rows={num_rows}, topk={topk}], got {list(probs.shape)}")
