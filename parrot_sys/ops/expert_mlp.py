"""`expert_mlp`: SwiGLU experts over images, dense (every expert, as one fat MLP) or top-k (chosen experts only)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import like_or_empty, or_none
from parrot_sys.ops._operator import operator
from parrot_sys.ops.topk_routing import TopKRouting

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk

_Grads = tuple[Tensor, Tensor, Tensor, Tensor]


class ExpertPlan(NamedTuple):
    """The (image, expert) pairs to run, by expert: the part of a `TopKRouting` that `expert_mlp` needs."""

    topk_indices: Tensor  # [n, K] int64, the expert of each slot; slots that the plan lacks may name any expert
    expert_offsets: Tensor  # [E + 1] int32, leading 0
    plan: Tensor  # [J <= n * K] int64, positions image * K + slot sorted by expert, ascending within an expert


@operator("expert_mlp_dense")
def _dense_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    args = (x, w_gate_up, w_down, probs)
    impl = registry.select("fp8_experts" if fp8 else "expert_mlp", *args)
    return impl.expert_mlp_dense_fwd(*args, (residual_scale, output_scale), save_z)


@_dense_fwd.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    z_shape = (w_gate_up.shape[0], *x.shape[:2], *w_gate_up.shape[1:3]) if save_z else (0,)
    return x.new_empty(x.shape), x.new_empty(z_shape)


@operator("expert_mlp_dense_bwd")
def _dense_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    z: Tensor,
    residual_scale: float,
    output_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (x, w_gate_up, w_down, probs)
    impl = registry.select("expert_mlp", *args)
    return impl.expert_mlp_dense_bwd(grad.contiguous(), *args, z, (residual_scale, output_scale), tuple(needs))


@_dense_bwd.register_fake
def _(grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, *rest: Any) -> _Grads:
    return _fake_grads((x, w_gate_up, w_down, probs), needs=rest[-1])


@operator("expert_mlp_topk")
def _topk_fwd(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    topk_indices: Tensor,
    expert_offsets: Tensor,
    plan: Tensor,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    args = (x, w_gate_up, w_down, probs, topk_indices, expert_offsets, plan)
    impl = registry.select("fp8_experts" if fp8 else "expert_mlp", *args)
    return impl.expert_mlp_topk_fwd(*args, (residual_scale, output_scale), save_z)


@_topk_fwd.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    topk_indices: Tensor,
    expert_offsets: Tensor,
    plan: Tensor,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    z_shape = (plan.shape[0], x.shape[1], *w_gate_up.shape[1:3]) if save_z else (0,)
    return x.new_empty(x.shape), x.new_empty(z_shape)


@operator("expert_mlp_topk_bwd")
def _topk_bwd(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    topk_indices: Tensor,
    expert_offsets: Tensor,
    plan: Tensor,
    z: Tensor,
    residual_scale: float,
    output_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (x, w_gate_up, w_down, probs, topk_indices, expert_offsets, plan)
    impl = registry.select("expert_mlp", *args)
    return impl.expert_mlp_topk_bwd(grad.contiguous(), *args, z, (residual_scale, output_scale), tuple(needs))


@_topk_bwd.register_fake
def _(grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, probs: Tensor, *rest: Any) -> _Grads:
    return _fake_grads((x, w_gate_up, w_down, probs), needs=rest[-1])


def _fake_grads(tensors: tuple[Tensor, ...], needs: list[bool]) -> _Grads:
    grad_x, grad_gate_up, grad_down, grad_probs = map(like_or_empty, tensors, needs)
    return grad_x, grad_gate_up, grad_down, grad_probs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.residual_scale, ctx.output_scale, _, _ = inputs
    z = output[1]
    # z is handed to this op's own backward pass only; without the second line autograd would fill a gradient of its
    # size with zeros.
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, z)


def _dense_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[:4])
    grads = _dense_bwd(grad, *ctx.saved_tensors, ctx.residual_scale, ctx.output_scale, needs)
    return *map(or_none, grads, needs), *(None,) * 4


def _topk_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    needs = list(ctx.needs_input_grad[:4])
    grads = _topk_bwd(grad, *ctx.saved_tensors, ctx.residual_scale, ctx.output_scale, needs)
    return *map(or_none, grads, needs), *(None,) * 7


_dense_fwd.register_autograd(_dense_backward, setup_context=_setup_context)
_topk_fwd.register_autograd(_topk_backward, setup_context=_setup_context)


def expert_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    probs: Tensor,
    *,
    plan: TopKRouting | ExpertPlan | None = None,
    residual_scale: float = 0.0,
    output_scale: float = 1.0,
    recompute: bool = False,
    fp8: bool = False,
) -> Tensor:
    """`residual_scale * x + output_scale * sum_e probs[:, e] * FFN_e(x)` with SwiGLU experts; one route per image.

    Args:
        x: [n, V, H] float, V rows of each of n images; n may be 0.
        w_gate_up: [E, 2, I, H], dtype of `x`; `[:, 0]` gate, `[:, 1]` up.
        w_down: [E, I, H], dtype of `x` (each expert's down-projection transposed).
        probs: [n, E] float32 (float64 for float64 `x`), the weight of each expert.
        plan: without it every expert runs on every row; with it only the (image, expert) pairs that it holds.
        residual_scale: factor of `x` in the sum.
        output_scale: factor of the experts' output.
        recompute: keep only `x` for the backward pass and compute the up-projection again there (in the dtype of `x`).
        fp8: round the operands of both products to float8 with scales by blocks of 128 (`parrot_kernels.fp8_experts`);
            gradients are those of the products in the dtype of `x`, at the pre-activations of the forward pass.

    Returns:
        [n, V, H], dtype of `x`. Saved for the backward pass: `x` and the up-projection's output.
    """
    tensors = (x.contiguous(), w_gate_up.contiguous(), w_down.contiguous(), probs.contiguous())
    save_z = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if plan is None:
        return _dense_fwd(*tensors, residual_scale, output_scale, save_z, fp8)[0]
    chosen = (plan.topk_indices, plan.expert_offsets, plan.plan)
    return _topk_fwd(*tensors, *chosen, residual_scale, output_scale, save_z, fp8)[0]
