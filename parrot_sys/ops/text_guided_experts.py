"""`text_guided_experts`: `text_guided_routing`, `topk_routing` and `expert_mlp` as one operator.

The same kernels as the three, called one after the other, or a softmax where every expert runs: what is saved is the
host's time between them, a plan that nobody reads, and a gradient of `x` that is zero but for the CLS rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator

# n images, V rows an image, H hidden_size, E experts, I ffn_hidden_size, K topk, G text rows

_softmax_bwd = torch._softmax_backward_data  # type: ignore[attr-defined]


@operator("text_guided_experts")
def _fwd(
    x: Tensor,
    query: Tensor | None,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    scale: float,
    topk: int,
    renormalize: bool,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    router = (x.select(1, 0) if query is None else query, text, text_start, text_end, router_weight, scale)
    logits, lse = registry.select("text_guided_routing", *router).text_guided_routing_fwd(*router)
    scales, op = (residual_scale, output_scale), "fp8_experts" if fp8 else "expert_mlp"
    if not topk:
        experts = (x, w_gate_up, w_down, torch.softmax(logits, -1))
        y, z = registry.select(op, *experts).expert_mlp_dense_fwd(*experts, scales, save_z)
        return y, logits, experts[-1], lse, z, []
    route = (logits, topk, renormalize)
    probs, *_, indices, _, offsets, plan = registry.select("topk_routing", *route).topk_routing_fwd(*route)
    chosen = (x, w_gate_up, w_down, probs, indices, offsets, plan)
    y, z = registry.select(op, *chosen).expert_mlp_topk_fwd(*chosen, scales, save_z)
    return y, logits, probs, lse, z, [indices, offsets, plan]


@_fwd.register_fake
def _(
    x: Tensor,
    query: Tensor | None,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    scale: float,
    topk: int,
    renormalize: bool,
    residual_scale: float,
    output_scale: float,
    save_z: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    images, num_experts = x.shape[0], router_weight.shape[0]
    logits = x.new_empty((images, num_experts), dtype=accumulate_dtype(x.dtype))
    lse, probs = logits.new_empty(images), torch.empty_like(logits)
    plan: list[Tensor] = []
    segments: tuple[int, ...] = (num_experts, images)
    if topk:
        segments = (images * topk,)
        indices = x.new_empty((images, topk), dtype=torch.int64)
        offsets = x.new_empty(num_experts + 1, dtype=torch.int32)
        plan = [indices, offsets, indices.new_empty(segments)]
    z_shape = (*segments, x.shape[1], *w_gate_up.shape[1:3]) if save_z else (0,)
    return x.new_empty(x.shape), logits, probs, lse, x.new_empty(z_shape), plan


_Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("text_guided_experts_bwd")
def _bwd(
    grad: Tensor | None,
    grad_logits: Tensor | None,
    grad_probs: Tensor | None,
    x: Tensor,
    query: Tensor | None,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    logits: Tensor,
    probs: Tensor,
    lse: Tensor,
    z: Tensor,
    plan: list[Tensor],
    scale: float,
    topk: int,
    renormalize: bool,
    residual_scale: float,
    output_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_query, needs_text, needs_router, needs_gate_up, needs_down = needs
    wanted = (needs_x if query is None else needs_query, needs_text, needs_router)
    if grad is None:
        grad = x.new_zeros(x.shape)
    experts = (x, w_gate_up, w_down, probs, *plan)
    impl = registry.select("expert_mlp", *experts)
    backward = impl.expert_mlp_topk_bwd if topk else impl.expert_mlp_dense_bwd
    expert_needs = (needs_x, needs_gate_up, needs_down, any(wanted))
    scales = (residual_scale, output_scale)
    grad_x, grad_gate_up, grad_down, own = backward(grad.contiguous(), *experts, z, scales, expert_needs)
    if not any(wanted):
        return grad_x, *(x.new_empty(0) for _ in wanted), grad_gate_up, grad_down
    own = own if grad_probs is None else own + grad_probs
    if topk:
        route = (logits, plan[0], renormalize, "softmax", 1.0)
        impl = registry.select("topk_routing", logits, topk, *route[2:])
        own = impl.topk_routing_bwd(own, None, None, None, None, *route)
    else:
        own = _softmax_bwd(own, probs, -1, probs.dtype)
    own = own if grad_logits is None else own + grad_logits
    router = (x.select(1, 0) if query is None else query, text, text_start, text_end, router_weight)
    impl = registry.select("text_guided_routing", *router, scale)
    grad_query, grad_text, grad_router = impl.text_guided_routing_bwd(own, None, *router, logits, lse, scale, wanted)
    if query is None and needs_x:
        grad_x.select(1, 0).add_(grad_query)
        grad_query = x.new_empty(0)
    return grad_x, grad_query, grad_text, grad_router, grad_gate_up, grad_down


@_bwd.register_fake
def _(grad: Tensor | None, grad_logits: Tensor | None, grad_probs: Tensor | None, *rest: Any) -> _Grads:
    x, query, text, _, _, router_weight, w_gate_up, w_down = rest[:8]
    tensors = (x, x if query is None else query, text, router_weight, w_gate_up, w_down)
    grads = tuple(map(like_or_empty, tensors, rest[-1]))
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, topk, renormalize, residual_scale, output_scale, _, _ = inputs
    ctx.numbers = scale, topk, renormalize, residual_scale, output_scale
    _, *route, plan = output
    ctx.mark_non_differentiable(*route[2:], *plan)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *route, *plan)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if not any(grad is not None for grad in grads[:3]):
        return (None,) * 15
    x, query, text, _, _, router, gate_up, down = ctx.needs_input_grad[:8]
    needs = [x, query, text, router, gate_up, down]
    saved = ctx.saved_tensors
    own = map(or_none, _bwd(*grads[:3], *saved[:12], list(saved[12:]), *ctx.numbers, needs), needs)
    grad_x, grad_query, grad_text, grad_router, grad_gate_up, grad_down = own
    return grad_x, grad_query, grad_text, None, None, grad_router, grad_gate_up, grad_down, *(None,) * 7


_fwd.register_autograd(_backward, setup_context=_setup_context)


def text_guided_experts(
    x: Tensor,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    scale: float,
    query: Tensor | None = None,
    topk: int | None = None,
    renormalize: bool = False,
    residual_scale: float = 0.0,
    output_scale: float = 1.0,
    recompute: bool = False,
    fp8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Routes each image by the text of its sample, and runs its experts: see the three ops for the exact rules.

    Args:
        x: [n, V, H], V >= 1 rows of each image; n may be 0.
        text: [G, H], dtype of `x`.
        text_start: [n] int, first text row of each image.
        text_end: [n], one past the last.
        router_weight: [E, H], dtype of `x`.
        w_gate_up: [E, 2, I, H], dtype of `x`.
        w_down: [E, I, H], dtype of `x`.
        scale: factor of the router's scores.
        query: [n, H], what asks the text; row 0 of each image when not given.
        topk: experts an image; all of them when not given.
        renormalize: divide the chosen weights by their sum.
        residual_scale: factor of `x` in the sum.
        output_scale: factor of the experts' output.
        recompute: keep only `x` of the experts for the backward pass.
        fp8: as for `expert_mlp`.

    Returns:
        y [n, V, H], and of the route: logits [n, E] and probs [n, E] (float32 or float64), with gradients, and the
        chosen experts [n, K] (None without `topk`).

    Raises:
        ValueError: topk out of range.
    """
    if topk is not None and not 1 <= topk <= router_weight.shape[0]:
        raise ValueError(f"topk must be in [1, num_experts={router_weight.shape[0]}], got {topk}")
    x, w_gate_up, w_down = x.contiguous(), w_gate_up.contiguous(), w_down.contiguous()
    tensors = (x, query, text, text_start, text_end, router_weight, w_gate_up, w_down)
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    numbers = (scale, topk or 0, renormalize, residual_scale, output_scale, saves and not recompute, fp8)
    y, logits, probs, *_, plan = _fwd(*tensors, *numbers)
    return y, logits, probs, plan[0] if plan else None
