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

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.launches import Launch, planned
from parrot_kernels.semaphores import semaphores
from parrot_kernels.text_guided_routing.kernels import (
    bwd_images_kernel,
    bwd_scores_kernel,
    bwd_text_kernel,
    fwd_kernel,
)
from parrot_kernels.tile_choice import Tile, Tiles, cdiv, cheapest, next_power_of_2, tables

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


# Columns of the text that a program of the images' gradients owns, and text rows that it takes at a time.
_IMAGE_TILES = tables(
    {
        "products": [
            Tile(sizes={"BLOCK_H": 32, "BLOCK_T": 32}, stages=4),
            Tile(sizes={"BLOCK_H": 64, "BLOCK_T": 64}, stages=3),
        ],
        # Products of true float32 run on the ordinary cores, and only the smallest tiles of them fit the registers.
        "fp32": [Tile(sizes={"BLOCK_H": 32, "BLOCK_T": 32}, stages=4)],
    },
    Tile(sizes={"BLOCK_H": 32, "BLOCK_T": 32}),
)


@functools.cache
def _text_tiles(block_e: int, element_size: int) -> Tiles:
    """For short texts and for long ones: columns of H that fit, of text, query and router, the memory of a block."""

    def tile(block_t: int) -> Tile:
        size = (block_t + _BLOCK_S + block_e) * element_size * 4  # stages
        fits = 128 * size <= 160 * 1024  # of every GPU from sm_80 on
        return Tile(sizes={"BLOCK_T": block_t, "BLOCK_H": 128 if fits else 64}, stages=4)

    # The products of long blocks with many experts would not fit the registers.
    return (tile(16), tile(64)) if block_e <= 32 else (tile(16),)


@functools.cache
def _bwd_text_tiles(choices: Tiles, element_size: int) -> Tiles:
    """Those of the text's gradient, for each of `choices`: as many columns as the registers take."""
    widths = {16: 128, 64: 128 // element_size}
    rows = [tile["BLOCK_T"] for tile in choices]
    return tuple(Tile(sizes={"BLOCK_T": own, "BLOCK_H": widths[own]}) for own in rows)


@functools.cache
def _sizes(num_experts: int, hidden: int, element_size: int, long: bool) -> tuple[dict[str, Any], Tile, Tiles]:
    """The sizes that the kernels are compiled for, and the tile of the text among its choices.

    Short texts are split finely, so that more programs share them; long ones coarsely, so that queries and router are
    read less often.
    """
    block_e = max(16, next_power_of_2(num_experts))
    choices = _text_tiles(block_e, element_size)
    constants = {"H": hidden, "E": num_experts, "BLOCK_E": block_e, "BLOCK_S": _BLOCK_S, "SCAN": 128}
    return constants, choices[-1] if long else choices[0], choices


def _sizes_of(
    num_rows: int, num_experts: int, hidden: int, element_size: int, processors: int
) -> tuple[int, dict[str, Any], Tile, Tiles]:
    """Number of text blocks, and `_sizes`."""
    constants, tile, choices = _sizes(num_experts, hidden, element_size, num_rows > 4 * 16 * processors)
    return cdiv(num_rows, tile["BLOCK_T"]), constants, tile, choices


def _image_tile(num_groups: int, hidden: int, processors: int, choices: Tiles) -> Tile:
    """The one with the fewer columns a processor, in whole waves."""

    def cost(tile: Tile) -> int:
        programs = num_groups * cdiv(hidden, tile["BLOCK_H"])
        return cdiv(programs, processors) * tile["BLOCK_H"]

    return cheapest(choices, cost)


# Numbers that the launches depend on: images, text rows, experts, width, bytes of an element, multiprocessors.
_Problem = tuple[int, int, int, int, int, int]
_Strides = tuple[int, int, int]


def _problem_of(query: Tensor, text: Tensor, router_weight: Tensor) -> _Problem:
    processors = triton_support.num_processors(text.device)
    return query.shape[0], text.shape[0], *router_weight.shape, text.element_size(), processors


@planned
def _fwd_launch(problem: _Problem, strides: _Strides, scale: float) -> Launch:
    num_images, num_rows, *sizes = problem
    num_blocks, constants, tile, choices = _sizes_of(num_rows, *sizes)
    grid = (max(1, num_blocks),)  # without text there are still logits to clear
    return Launch(fwd_kernel, grid, tile, choices, numbers=(num_images, num_rows, *strides, scale), constants=constants)


def text_guided_routing_fwd(
    query: Tensor, text: Tensor, text_start: Tensor, text_end: Tensor, router_weight: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    query, text, router_weight = _rows(query), _rows(text), _rows(router_weight)
    num_images, num_experts, device = query.shape[0], router_weight.shape[0], query.device
    logits = torch.empty(num_images, num_experts, dtype=torch.float32, device=device)
    lse = logits.new_empty(num_images)
    if num_images:
        strides = query.stride(0), text.stride(0), router_weight.stride(0)
        own = _fwd_launch(_problem_of(query, text, router_weight), strides, scale)
        parts, counters = logits.new_empty(num_images, own.grid[0], num_experts + 2), semaphores(num_images, device)
        own(query, text, text_start.contiguous(), text_end.contiguous(), router_weight, parts, counters, logits, lse)
    return logits, lse


@dataclass(frozen=True, kw_only=True, slots=True)
class _Backward:
    """The launches of a backward pass, and the sizes of what they share."""

    num_blocks: int
    scores: Launch
    text: Launch | None
    images: Launch | None
    num_groups: int
    """Of images, with a part of the router's gradient each."""
    counters: int
    """As many as the launch with the most needs; each finds and leaves them at zero."""


@planned
def _backward_plan(
    problem: _Problem, strides: _Strides, scale: float, float32: bool, needs: tuple[bool, bool, bool]
) -> _Backward:
    num_images, num_rows, _, hidden, element_size, processors = problem
    num_blocks, constants, tile, choices = _sizes_of(*problem[1:])
    query_stride, text_stride, router_stride = strides
    counts = num_images, num_rows
    scores = Launch(
        bwd_scores_kernel, (num_blocks,), tile, choices, numbers=(*counts, *strides, scale), constants=constants
    )
    # Three TF32 products make one of float32 accuracy to half a bfloat16 bit and far beyond; float32 gets the real one.
    precision = "ieee" if float32 else "tf32x3"
    text = images = None
    if needs[1]:
        blocks = _bwd_text_tiles(choices, element_size)
        block = blocks[choices.index(tile)]
        text = Launch(
            bwd_text_kernel, (num_blocks, cdiv(hidden, block["BLOCK_H"])), block, blocks,
            numbers=(*counts, query_stride, router_stride, scale), constants={**constants, "PRECISION": precision},
        )  # fmt: skip
    num_groups = cdiv(num_images, _BLOCK_S)
    if needs[0] or needs[2]:
        constants = {name: value for name, value in constants.items() if name != "SCAN"}
        constants |= {"PRECISION": precision, "NEEDS_QUERY": needs[0], "NEEDS_ROUTER": needs[2]}
        choices = _IMAGE_TILES["fp32" if float32 else "products"]
        tile = _image_tile(num_groups, hidden, processors, choices)
        images = Launch(
            bwd_images_kernel, (cdiv(hidden, tile["BLOCK_H"]), num_groups), tile, choices,
            numbers=(*counts, text_stride, scale), constants=constants,
        )  # fmt: skip
    return _Backward(
        num_blocks=num_blocks,
        scores=scores,
        text=text,
        images=images,
        num_groups=num_groups if needs[2] else 0,
        counters=max(num_images, cdiv(hidden, 32)),
    )


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
    query, text, router_weight = _rows(query), _rows(text), _rows(router_weight)
    tensors = (query, text, router_weight)
    grads = [torch.empty_like(own) if needed else own.new_empty(0) for own, needed in zip(tensors, needs, strict=True)]
    num_images, num_rows = query.shape[0], text.shape[0]
    if not (num_images and num_rows):
        return tuple(grad.zero_() for grad in grads)  # type: ignore[return-value]
    grad_logits, grad_lse = grad_logits.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    spans = text_start.contiguous(), text_end.contiguous()
    strides = query.stride(0), text.stride(0), router_weight.stride(0)
    own = _backward_plan(
        _problem_of(query, text, router_weight), strides, scale, query.dtype == torch.float32, tuple(needs)
    )
    scratch, counters = lse.new_empty, semaphores(own.counters, query.device)
    # Of the scores only those inside a span are ever touched.
    pairs = scratch(num_images, num_rows), scratch(num_images, num_rows), scratch(num_images, 3)
    own.scores(
        query, text, *spans, router_weight, grad_logits, grad_lse, *pairs[:2],
        scratch(num_images, own.num_blocks, 3), counters, pairs[2],
    )  # fmt: skip
    if own.text is not None:
        own.text(query, *spans, router_weight, grad_logits, *pairs, grads[1])
    if own.images is not None:
        parts = scratch(own.num_groups, *router_weight.shape)
        own.images(text, *spans, grad_logits, *pairs, grads[0], parts, counters, grads[2])
    return grads[0], grads[1], grads[2]
