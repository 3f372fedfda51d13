"""CPU `text_guided_routing`: BLAS for the router's projections, C++ loops over the spans for the attention."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import _extension

# S images, T text rows, H hidden_size, E experts


def why_not(*args: object) -> str | None:
    """Needs the C++ extension and CPU tensors of at most 32 bits."""
    if reason := _extension.why_not():
        return reason
    for tensor in args:
        if isinstance(tensor, Tensor):
            if tensor.device.type != "cpu":
                return f"it needs CPU tensors, got {tensor.device.type}"
            if tensor.dtype == torch.float64:
                return "it computes in float32, got float64"
    return None


def _prepare(*tensors: Tensor) -> list[Tensor]:
    """What the C++ loops take: contiguous float32, and int64 for the spans."""
    return [tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64).contiguous() for tensor in tensors]


def text_guided_routing_fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    query, text, start, end = _prepare(query, text, text_start, text_end)
    projected = text @ router_weight.float().T
    return torch.ops.parrot_ext.text_guided_routing_fwd(query, text, start, end, projected, scale)


def text_guided_routing_bwd(
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
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype = query.dtype
    query, text, start, end, router_weight, grad_logits = _prepare(
        query, text, text_start, text_end, router_weight, grad_logits
    )
    needs_query, needs_text, needs_router_weight = needs
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    grad_query, grad_text, grad_projected = torch.ops.parrot_ext.text_guided_routing_bwd(
        grad_logits, grad_lse, query, text, start, end, text @ router_weight.T, scale, needs_query, needs_text
    )
    none = query.new_empty(0, dtype=dtype)  # cloned for each use: outputs of an op must not alias
    return (
        grad_query.to(dtype) if needs_query else none.clone(),
        grad_text.addmm_(grad_projected, router_weight).to(dtype) if needs_text else none.clone(),
        (grad_projected.T @ text).to(dtype) if needs_router_weight else none.clone(),
    )
