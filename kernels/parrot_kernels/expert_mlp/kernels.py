"""Triton kernels that lay out routes of `expert_mlp`, and their launches, for `route`."""

from __future__ import annotations

import triton
import triton.language as tl

from parrot_kernels.launches import Launch, planned
from parrot_kernels.tile_choice import cdiv, next_power_of_2

_SEGMENTS = 128  # of one program


@triton.jit(do_not_specialize=["segments", "images"])
def layout_kernel(
    plan_ptr, experts_ptr, probs_ptr, places_ptr, weights_ptr, scale, segments, images, topk, num_experts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of the plan, if there is one, and the weights of the segments, if `weights_ptr` is given."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < segments
    if plan_ptr is None:
        image, expert = place % images, place // images
    else:
        position = tl.load(plan_ptr + place, mask=mask, other=0)
        tl.store(places_ptr + position, place, mask=mask)
        image, expert = position // topk, tl.load(experts_ptr + position, mask=mask, other=0)
    if weights_ptr is not None:
        weight = tl.load(probs_ptr + image * num_experts + expert, mask=mask, other=0.0)
        tl.store(weights_ptr + place, scale * weight, mask=mask)


@triton.jit(do_not_specialize=["images", "segments", "rows"])
def grad_probs_kernel(
    sums_ptr, places_ptr, experts_ptr, grad_ptr, scale, images, segments, rows, blocks, topk, num_experts,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad[i, e] = scale * the sum of sums [blocks, segments, rows] of the segment of image i and expert e; else 0."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image, expert = pair // num_experts, pair % num_experts
    mask = image < images
    if places_ptr is None:
        place = expert * images + image
    else:
        place = tl.full([BLOCK], -1, tl.int64)
        for k in range(topk):
            choice = image * topk + k
            own = tl.load(places_ptr + choice, mask=mask, other=-1)
            chosen = tl.load(experts_ptr + choice, mask=mask, other=-1) == expert
            place = tl.where(chosen & (own >= 0), own, place)
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for block in range(blocks):
        at = (tl.cast(block, tl.int64) * segments + place) * rows
        for row in range(0, rows, BLOCK_V):
            cols = row + tl.arange(0, BLOCK_V)
            own_mask = (mask & (place >= 0))[:, None] & (cols < rows)[None, :]
            total += tl.load(sums_ptr + at[:, None] + cols[None, :], mask=own_mask, other=0.0)
    tl.store(grad_ptr + pair, scale * tl.sum(total, axis=1), mask=mask)


@planned
def layout_launch(segments: int, images: int, topk: int, num_experts: int, scale: float) -> Launch:
    """Of `layout_kernel`."""
    numbers = (scale, segments, images, topk, num_experts)
    return Launch(layout_kernel, (cdiv(segments, _SEGMENTS),), numbers=numbers, constants={"BLOCK": _SEGMENTS})


@planned
def grad_probs_launch(
    images: int, segments: int, rows: int, blocks: int, topk: int, num_experts: int, scale: float
) -> Launch:
    """Of `grad_probs_kernel`."""
    block_v = min(next_power_of_2(max(rows, 1)), 1024)
    block = 1024 // block_v
    numbers, constants = (
        (scale, images, segments, rows, blocks, topk, num_experts),
        {"BLOCK": block, "BLOCK_V": block_v},
    )
    grid = (cdiv(images * num_experts, block),)
    return Launch(grad_probs_kernel, grid, numbers=numbers, constants=constants)
