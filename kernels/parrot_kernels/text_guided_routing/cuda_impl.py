"""CUDA `text_guided_routing` for Hopper: one launch forward, three backward (csrc/cuda/text_guided_routing*.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels import cuda_support
from parrot_kernels.semaphores import semaphores

# S images, T text rows, H hidden_size, E experts

MAX_EXPERTS = 64
MAX_SCORES = 2**28  # one float of scratch for each image and text row: 1 GiB


def why_not(*args: object) -> str | None:
    """Needs Hopper, at most 64 experts, rows of whole 16-byte vectors, and at most 2^28 (image, row) pairs."""
    if reason := cuda_support.why_not(*args):
        return reason
    if len(args) < 5:
        return None
    query, text, _, _, router_weight = args[:5]
    assert isinstance(query, Tensor)
    assert isinstance(text, Tensor)
    assert isinstance(router_weight, Tensor)
    if router_weight.shape[0] > MAX_EXPERTS:
        return f"it takes at most {MAX_EXPERTS} experts, got {router_weight.shape[0]}"
    if (pairs := query.shape[0] * text.shape[0]) > MAX_SCORES:
        return f"it keeps a score for each image and text row, at most {MAX_SCORES}, got {pairs}"
    for tensor in (query, text, router_weight):
        if reason := cuda_support.why_not_aligned("hidden_size", query.shape[1], tensor):
            return reason
    return None


def _rows(query: Tensor) -> Tensor:
    """`query` as the kernels read it: a view is fine as long as its rows are dense and start at 16-byte boundaries."""
    vector = cuda_support.ALIGNMENT // query.element_size()
    dense = query.stride(1) == 1 and query.stride(0) % vector == 0 and query.stride(0) >= query.shape[1]
    return query if dense else query.contiguous()


def text_guided_routing_fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    tensors = (text.contiguous(), text_start.contiguous(), text_end.contiguous(), router_weight.contiguous())
    arrived = semaphores(query.shape[0], query.device)
    return torch.ops.parrot_ext.text_guided_routing_cuda_fwd(_rows(query), *tensors, arrived, scale)


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
    tensors = (text.contiguous(), text_start.contiguous(), text_end.contiguous(), router_weight.contiguous())
    return torch.ops.parrot_ext.text_guided_routing_cuda_bwd(
        grad_logits.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        _rows(query),
        *tensors,
        lse,
        semaphores(query.shape[0], query.device),
        scale,
        *needs,
    )
