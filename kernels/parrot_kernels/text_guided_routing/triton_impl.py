"""Triton `text_guided_routing`: one launch forward, at most three backward, no float atomics, no host synchronisation.

Forward. A program takes BLOCK_T text rows and finds the images whose spans touch them. One loop over H gives the rows'
scores with up to BLOCK_S of those images and their products with the router; of each image it stores the partial
softmax (largest score, sum, weighted products) of these rows. The program that finishes an image, told by a counter,
merges the image's partial results in the order of the rows: which program that is changes no bit of the result.

Backward. `bwd_scores_kernel` repeats this for the scores and their gradients before the softmax; `bwd_text_kernel`
owns text rows and sums over the images that read them in the order of the images; `bwd_images_kernel` owns BLOCK_S
images and some columns, and reads the images' text a second time for the gradients of query and router.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.text_guided_routing.kernels import (
    bwd_images_kernel,
    bwd_scores_kernel,
    bwd_text_kernel,
    fwd_kernel,
)

# S images, T text rows, H hidden_size, E experts

_BLOCK_S = 16  # the least that tl.dot takes; images of one sample share their text rows
_MAX_EXPERTS = 64  # a row's products with all of them stay in registers


def why_not(*args: object) -> str | None:
    """Needs a GPU or the interpreter, at most 32 bits, and a router of at most 64 experts."""
    if reason := triton_support.why_not(*args):
        return reason
    if len(args) > 4 and isinstance(router := args[4], Tensor) and router.shape[0] > _MAX_EXPERTS:
        return f"it holds at most {_MAX_EXPERTS} experts in registers, got {router.shape[0]}"
    return None


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with a contiguous last dimension; rows may have any stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(query: Tensor, text: Tensor, router_weight: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of text blocks, and the sizes that the kernels are compiled for."""
    num_experts, hidden = router_weight.shape
    block_e = max(16, triton.next_power_of_2(num_experts))
    # Short texts are split finely, so that more programs share them; long ones coarsely, so that queries and router are
    # read less often, unless the products with many experts would not fit the registers.
    long = text.shape[0] > 4 * 16 * triton_support.num_processors(text.device)
    block_t = 64 if long and block_e <= 32 else 16
    constants = {"H": hidden, "E": num_experts, "BLOCK_E": block_e}
    return triton.cdiv(text.shape[0], block_t), {**constants, "BLOCK_S": _BLOCK_S, "BLOCK_T": block_t, "SCAN": 128}


def text_guided_routing_fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    query, text, router_weight = map(_rows, (query, text, router_weight))
    num_images, num_experts = query.shape[0], router_weight.shape[0]
    logits = query.new_empty((num_images, num_experts), dtype=torch.float32)
    lse = query.new_empty(num_images, dtype=torch.float32)
    if num_images:
        num_blocks, constants = _sizes(query, text, router_weight)
        num_blocks = max(1, num_blocks)  # without text there are still logits to clear
        parts = query.new_empty((num_images, num_blocks, num_experts + 2), dtype=torch.float32)
        fwd_kernel[(num_blocks,)](
            query, text, text_start.contiguous(), text_end.contiguous(), router_weight, parts,
            triton_support.semaphores(num_images, query.device), logits, lse,
            num_images, text.shape[0], query.stride(0), text.stride(0), router_weight.stride(0), scale, **constants,
        )  # fmt: skip
    return logits, lse


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
    query, text, router_weight = map(_rows, (query, text, router_weight))
    grads = tuple(
        tensor.new_empty(tensor.shape if needed else 0)
        for tensor, needed in zip((query, text, router_weight), needs, strict=True)
    )
    num_images, num_rows = query.shape[0], text.shape[0]
    if not (num_images and num_rows):
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    grad_logits, grad_lse = grad_logits.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    spans = text_start.contiguous(), text_end.contiguous()
    num_blocks, constants = _sizes(query, text, router_weight)
    num_experts, hidden = router_weight.shape

    def scratch(*sizes: int) -> Tensor:
        return query.new_empty(sizes, dtype=torch.float32)

    # Of the scores only those inside a span are ever touched.
    scores, grad_attention = scratch(2, num_images, num_rows).unbind()
    stats, parts = scratch(num_images, 3), scratch(num_images, num_blocks, 3)
    bwd_scores_kernel[(num_blocks,)](
        query, text, *spans, router_weight, grad_logits, grad_lse, scores, grad_attention, parts,
        triton_support.semaphores(num_images, query.device), stats,
        num_images, num_rows, query.stride(0), text.stride(0), router_weight.stride(0), scale, **constants,
    )  # fmt: skip
    # Three TF32 products make one of float32 accuracy to half a bfloat16 bit and far beyond; float32 gets the real one.
    constants["PRECISION"] = "ieee" if query.dtype == torch.float32 else "tf32x3"
    pairs = scores, grad_attention, stats
    if needs[1]:
        block_h = 128
        bwd_text_kernel[(num_blocks, triton.cdiv(hidden, block_h))](
            query, *spans, router_weight, grad_logits, *pairs, grads[1],
            num_images, num_rows, query.stride(0), router_weight.stride(0), scale, **constants, BLOCK_H=block_h,
        )  # fmt: skip
    if needs[0] or needs[2]:
        del constants["BLOCK_T"], constants["SCAN"]
        num_groups = triton.cdiv(num_images, _BLOCK_S)
        parts = scratch(num_groups if needs[2] else 0, num_experts, hidden)
        bwd_images_kernel[lambda config: (triton.cdiv(hidden, config["BLOCK_H"]), num_groups)](
            text, *spans, grad_logits, *pairs, grads[0], parts,
            triton_support.semaphores(triton.cdiv(hidden, 32), query.device), grads[2],
            num_images, num_rows, text.stride(0), scale,
            **constants, NEEDS_QUERY=needs[0], NEEDS_ROUTER=needs[2],
        )  # fmt: skip
    return grads  # type: ignore[return-value]
