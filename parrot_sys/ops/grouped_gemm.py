"""`m_grouped_gemm`, `m_grouped_swiglu`, `k_grouped_gemm`: one matrix product for each group of a ragged batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator

# G groups, J segments, V rows a segment, S segments before the gather, N and K widths, I inner width


def _count(x: Tensor, plan: Tensor | None) -> int:
    return len(x) if plan is None else len(plan)


@operator("m_grouped_gemm")
def _gemm_fwd(
    x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool, fp8: bool
) -> Tensor:
    args = (x, w, offsets, plan, topk, trans_w)
    return registry.select("fp8_experts" if fp8 else "grouped_gemm", *args).m_grouped_gemm(*args)


@_gemm_fwd.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None, topk: int, trans_w: bool, fp8: bool) -> Tensor:
    return x.new_empty(_count(x, plan), x.shape[1], w.shape[1] if trans_w else w.shape[2])


@operator("m_grouped_gemm_bwd")
def _gemm_bwd(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    trans_w: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    args = (x, w, offsets, plan, topk, trans_w)
    return registry.select("grouped_gemm", *args).m_grouped_gemm_bwd(grad.contiguous(), *args, tuple(needs))


@_gemm_bwd.register_fake
def _(grad: Tensor, x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs = rest[-1]
    return like_or_empty(x, needs[0]), like_or_empty(w, needs[1])


def _gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.topk, ctx.trans_w, _ = inputs
    ctx.save_for_backward(*tensors)


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = _gemm_bwd(grad, *ctx.saved_tensors, ctx.topk, ctx.trans_w, needs)
    return *map(or_none, grads, needs), *(None,) * 5


_gemm_fwd.register_autograd(_gemm_backward, setup_context=_gemm_context)


@operator("m_grouped_swiglu")
def _swiglu_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    args = (x, w_gate_up, offsets, plan, topk, weights)
    return registry.select("fp8_experts" if fp8 else "grouped_gemm", *args).m_grouped_swiglu(*args, save_z)


@_swiglu_fwd.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    rows, width = (_count(x, plan), x.shape[1]), w_gate_up.shape[2]
    return x.new_empty(*rows, width), x.new_empty((*rows, 2, width) if save_z else (0,))


@operator("m_grouped_swiglu_bwd")
def _swiglu_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    plan: Tensor | None,
    topk: int,
    weights: Tensor | None,
    z: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    args = (x, w_gate_up, offsets, plan, topk, weights)
    return registry.select("grouped_gemm", *args).m_grouped_swiglu_bwd(grad.contiguous(), *args, z, tuple(needs))


@_swiglu_bwd.register_fake
def _(grad: Tensor, x: Tensor, w_gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, weights, _, needs = rest
    grad_weights = x.new_empty(0 if weights is None else len(weights), dtype=accumulate_dtype(x.dtype))
    return like_or_empty(x, needs[0]), like_or_empty(w_gate_up, needs[1]), grad_weights


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate_up, offsets, plan, ctx.topk, weights, *_ = inputs
    # z is for this op's own backward pass; without the second line autograd would fill a gradient of its size.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_gate_up, offsets, plan, weights, output[1])


def _swiglu_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, w_gate_up, offsets, plan, weights, z = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grad_x, grad_w, grad_weights = _swiglu_bwd(grad, x, w_gate_up, offsets, plan, ctx.topk, weights, z, needs)
    return (
        or_none(grad_x, needs[0]),
        or_none(grad_w, needs[1]),
        None,
        None,
        None,
        or_none(grad_weights, ctx.needs_input_grad[5]),
        None,
        None,
    )


_swiglu_fwd.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


@operator("k_grouped_gemm")
def _k_fwd(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    args = (a, b, offsets, plan, topk)
    return registry.select("grouped_gemm", *args).k_grouped_gemm(*args)


@_k_fwd.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor, plan: Tensor | None, topk: int) -> Tensor:
    return a.new_empty(len(offsets) - 1, a.shape[-1], b.shape[-1])


def _k_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.topk = inputs
    ctx.save_for_backward(*tensors)


def _k_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets, plan = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad[:2]
    # c = sum of outer(a, b): the gradient of a is b @ grad.T, that of b is a @ grad, group by group.
    grad_a = _gemm_fwd(b, grad.contiguous(), offsets, plan, ctx.topk, True, False) if needs_a else None
    grad_b = None
    if needs_b:
        # As the gradient of the input x = b of a product that maps b to rows like a.
        grad_b, _ = _gemm_bwd(a, b, grad.contiguous(), offsets, plan, ctx.topk, True, [True, False])
    return grad_a, grad_b, None, None, None


_k_fwd.register_autograd(_k_backward, setup_context=_k_context)


def m_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    plan: Tensor | None = None,
    topk: int = 1,
    trans_w: bool = True,
    fp8: bool = False,
) -> Tensor:
    """The rows of each group times the group's matrix.

    Args:
        x: [J, K] rows, or [J, V, K] segments of V rows, in the order of the groups; with `plan` [S, ...] in any order.
        w: [G, N, K] (as in torch.nn.Linear), or [G, K, N] with `trans_w=False`; dtype of `x`.
        offsets: [G + 1] int32 or int64 on the device of `x`, with the leading 0: group g holds the rows or segments
            offsets[g] to offsets[g + 1]. What lies past offsets[G] comes out as zeros.
        plan: [J] int64: row or segment j reads `x[plan[j] // topk]`; all entries differ (`TopKRouting.plan`).
        topk: divisor of `plan`; 1 makes it a plain index.
        trans_w: layout of `w`.
        fp8: round the operands to float8 with scales by blocks of 128 (`parrot_kernels.fp8_experts` has the bounds);
            gradients are those of the product in the dtype of `x`.

    Returns:
        [J, N] or [J, V, N], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, w, w.shape[2] if trans_w else w.shape[1], offsets)
    y = _gemm_fwd(*_segments(x, w, offsets, plan), topk, trans_w, fp8)
    return y.squeeze(1) if x.dim() == 2 else y


def m_grouped_swiglu(
    x: Tensor,
    w_gate_up: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    plan: Tensor | None = None,
    topk: int = 1,
    recompute: bool = False,
    fp8: bool = False,
) -> Tensor:
    """`weights * silu(x @ gate.T) * (x @ up.T)` with the matrices of each row's group, in one product.

    Args:
        x: as for `m_grouped_gemm`.
        w_gate_up: [G, 2, I, K], dtype of `x`; `[:, 0]` gate, `[:, 1]` up.
        offsets: as for `m_grouped_gemm`.
        weights: [J] float32 (float64 for float64 `x`), the factor of each row or segment; None for ones.
        plan: as for `m_grouped_gemm`.
        topk: as for `m_grouped_gemm`.
        recompute: keep only the inputs for the backward pass and compute the pre-activations again there (in the dtype
            of `x`).
        fp8: as for `m_grouped_gemm`.

    Returns:
        [J, I] or [J, V, I], dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, w_gate_up, w_gate_up.shape[-1], offsets)
    if w_gate_up.dim() != 4 or w_gate_up.shape[1] != 2:
        raise ValueError(f"w_gate_up must be [G, 2, I, K], got {list(w_gate_up.shape)}")
    if weights is not None and weights.shape != (_count(x, plan),):
        raise ValueError(f"weights must be [{_count(x, plan)}], got {list(weights.shape)}")
    learning = any(t.requires_grad for t in (x, w_gate_up, weights) if t is not None)
    save_z = not recompute and learning and torch.is_grad_enabled()
    factors = None if weights is None else weights.contiguous()
    h, _ = _swiglu_fwd(*_segments(x, w_gate_up, offsets, plan), topk, factors, save_z, fp8)
    return h.squeeze(1) if x.dim() == 2 else h


def k_grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, *, plan: Tensor | None = None, topk: int = 1) -> Tensor:
    """`a.T @ b` over the rows of each group: the gradient of the weights of `m_grouped_gemm`.

    Args:
        a: [J, N] or [J, V, N], in the order of the groups.
        b: [J, K] or [J, V, K], dtype of `a`; with `plan` [S, ...] in any order, as `x` of `m_grouped_gemm`.
        offsets: as for `m_grouped_gemm`; rows past offsets[G] go in nowhere.
        plan: as for `m_grouped_gemm`.
        topk: as for `m_grouped_gemm`.

    Returns:
        [G, N, K], dtype of `a`; zeros for empty groups.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if a.dim() != b.dim() or a.dim() not in (2, 3) or a.shape[1:-1] != b.shape[1:-1]:
        raise ValueError(f"a and b must both be [J, width] or [J, V, width], got {list(a.shape)} and {list(b.shape)}")
    if len(a) != _count(b, plan):
        raise ValueError(f"a must have {_count(b, plan)} rows or segments, got {len(a)}")
    segments = (t.unsqueeze(1) if t.dim() == 2 else t for t in (a, b))
    return _k_fwd(*(t.contiguous() for t in segments), offsets, plan, topk)


def _check(x: Tensor, w: Tensor, depth: int, offsets: Tensor) -> None:
    if x.dim() not in (2, 3) or x.shape[-1] != depth:
        raise ValueError(f"x must be [J, {depth}] or [J, V, {depth}], got {list(x.shape)}")
    if offsets.shape != (len(w) + 1,):
        raise ValueError(f"offsets must be [G + 1 = {len(w) + 1}], got {list(offsets.shape)}")


def _segments(
    x: Tensor, w: Tensor, offsets: Tensor, plan: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Contiguous arguments of the launchers; rows become segments of one row."""
    x = x.unsqueeze(1) if x.dim() == 2 else x
    return x.contiguous(), w.contiguous(), offsets.contiguous(), None if plan is None else plan.contiguous()
