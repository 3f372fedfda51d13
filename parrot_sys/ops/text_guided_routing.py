"""`text_guided_routing`: router logits of each image from its CLS row and the text of its sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parrot_sys.ops import registry
from parrot_sys.ops._common import accumulate_dtype, like_or_empty, or_none
from parrot_sys.ops._operator import operator


@operator("text_guided_routing")
def _fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    args = (query, text, text_start, text_end, router_weight, scale)
    return registry.select("text_guided_routing", *args).text_guided_routing_fwd(*args)


@_fwd.register_fake
def _(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(query.dtype)
    num_images = query.shape[0]
    return query.new_empty((num_images, router_weight.shape[0]), dtype=dtype), query.new_empty(num_images, dtype=dtype)


@operator("text_guided_routing_bwd")
def _bwd(
    grad_logits: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    args = (query, text, text_start, text_end, router_weight)
    impl = registry.select("text_guided_routing", *args, scale)
    return impl.text_guided_routing_bwd(grad_logits, grad_lse, *args, logits, lse, scale, tuple(needs))


@_bwd.register_fake
def _(
    grad_logits: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    text: Tensor,
    text_start: Tensor,
    text_end: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    lse: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return like_or_empty(query, needs[0]), like_or_empty(text, needs[1]), like_or_empty(router_weight, needs[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logits: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, logits, lse = ctx.saved_tensors
    needs_query, needs_text, _, _, needs_router_weight, _ = ctx.needs_input_grad
    needs = [needs_query, needs_text, needs_router_weight]
    if grad_logits is None:
        grad_logits = torch.zeros_like(logits)
    grads = _bwd(grad_logits, grad_lse, *tensors, logits, lse, ctx.scale, needs)
    grad_query, grad_text, grad_router_weight = map(or_none, grads, needs)
    return grad_query, grad_text, None, None, grad_router_weight, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


def text_guided_routing(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Router logits of S images, each attending with one query over its own span of the text rows.

    `logits[s] = softmax(scale * query[s] @ text[span].T) @ text[span] @ router_weight.T` (Parrot,
    arXiv 2406.02539, eq. 2 and 3), computed without the hidden-wide context. An empty span gives zero logits.

    Args:
        query: [S, H], the CLS row of each image.
        text: [T, H], embeddings of the guiding tokens of all samples, dtype of `query`.
        text_start: [S] int32 or int64, first text row of each image; images may share spans.
        text_end: [S], one past the last text row.
        router_weight: [E, H], dtype of `query`.
        scale: factor of the scores, 1 / sqrt(H) in Parrot.

    Returns:
        logits [S, E] and lse [S] (log-sum-exp of the scores), float32 (float64 for float64 inputs), with gradients.
    """
    return _fwd(query, text, text_start, text_end, router_weight, scale)
