"""Triton `linear_cross_entropy`: products whose epilogues take the logits in before they reach memory.

Forward: one product over all tiles of logits; of each tile only the largest logit of a row and the sum of the
exponentials are stored (two numbers for _VOCABULARY_TILE logits), and a small kernel combines the tiles of a row.
Backward, for one chunk of the vocabulary after the other: the same product again, whose epilogue stores the gradient of
the logits of the chunk, and the two products with it. No atomics: the chunks add to the gradient of `hidden` in order.

Operands of two bytes come by TMA on sm_90 and later, others through pointers (see `grouped_gemm.tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.grouped_gemm.tiles import product_kind, tma_reads
from parrot_kernels.launches import launch
from parrot_kernels.linear_cross_entropy import kernels
from parrot_kernels.tile_choice import Tile, Tiles, cdiv, cheapest, product_cost, product_tile, tables

# L label rows, H hidden_size, N vocabulary rows held here, B columns of a chunk

CHUNK_BYTES = 256 * 2**20  # of gradients of logits that exist at a time
MIN_CHUNK = 1024

# All of a kind have the same BLOCK_N: the forward pass allocates by the number of tiles along the vocabulary.
_TINY = product_tile(16, 32, 32, warps=4, stages=1)  # in the interpreter
_FP32 = [product_tile(64, 64, 16, warps=4, stages=2)]
_FWD_TILES = tables(
    {
        "tma": [product_tile(128, 256, 128, warps=8, stages=2)],
        "pointer": [product_tile(128, 128, 32, warps=8, stages=4)],
        "fp32": _FP32,
    },
    _TINY,
)
_GRAD_LOGITS_TILES = tables(
    {
        "tma": [product_tile(128, 256, 64, warps=8, stages=4), product_tile(64, 256, 64, warps=4, stages=4)],
        "pointer": [product_tile(128, 128, 32, warps=8, stages=4), product_tile(64, 128, 32, warps=4, stages=4)],
        "fp32": _FP32,
    },
    _TINY,
)
_MATMUL_TILES = tables(
    {
        "tma": [product_tile(128, 128, 64, warps=8, stages=4)],
        "pointer": [product_tile(64, 128, 32, warps=4, stages=4), product_tile(64, 64, 32, warps=4, stages=4)],
        "fp32": _FP32,
    },
    _TINY,
)


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs."""
    return triton_support.why_not(*args)


def _kind(hidden: Tensor, weight: Tensor) -> str:
    """Which tiles fit; rows of any width go through pointers."""
    kind = product_kind(hidden.element_size(), tma_reads(hidden, weight), hidden.shape[-1])
    return "pointer" if kind == "unaligned" else kind


def _launch(kernel: Any, choices: Tiles, like: Tensor, rows: int, columns: int, depth: int) -> Callable[..., None]:
    """`kernel` for a product of these sizes, in as many programs as run at a time, or as there are tiles."""
    processors = triton_support.num_processors(like.device)

    def count(tile: Tile) -> int:
        return cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"])

    def cost(tile: Tile) -> float:
        return product_cost(tile, count(tile), depth, processors, element_size=like.element_size())

    tile = cheapest(choices, cost)
    return launch(kernel, (min(processors, count(tile)),), tile, choices)


def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, width = hidden.shape
    num_columns = weight.shape[0]
    target_logits = hidden.new_zeros(num_rows, dtype=torch.float32)
    lse = torch.empty_like(target_logits)
    if not num_rows:
        return lse, target_logits
    hidden, weight = hidden.contiguous(), weight.contiguous()
    kind = _kind(hidden, weight)
    num_tiles = cdiv(num_columns, _FWD_TILES[kind][0]["BLOCK_N"])
    tops, totals = lse.new_empty(num_tiles, num_rows), lse.new_empty(num_tiles, num_rows)
    _launch(kernels.fwd_kernel, _FWD_TILES[kind], hidden, num_rows, num_columns, width)(
        hidden, weight, targets, tops, totals, target_logits, num_rows, num_columns, width, vocab_start,
        TMA=kind == "tma",
    )  # fmt: skip
    rows, tiles = 32, 64
    launch(kernels.combine_kernel, (cdiv(num_rows, rows),))(
        tops, totals, lse, num_rows, num_tiles, ROWS=rows, TILES=tiles
    )
    return lse, target_logits


def _chunks(num_rows: int, num_columns: int, element_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of the vocabulary whose gradients of logits stay within CHUNK_BYTES (but at least MIN_CHUNK columns)."""
    size = max(CHUNK_BYTES // (element_size * num_rows) // MIN_CHUNK, 1) * MIN_CHUNK
    for start in range(0, num_columns, size):
        yield start, min(start + size, num_columns)


def linear_cross_entropy_bwd(
    grad_lse: Tensor,
    grad_target_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_start: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, width = hidden.shape
    needs_hidden, needs_weight = needs
    dtype = hidden.dtype
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    if not num_rows:
        return grad_hidden.to(dtype), grad_weight.zero_()
    hidden, weight = hidden.contiguous(), weight.contiguous()
    grad_lse, grad_target_logits = grad_lse.contiguous(), grad_target_logits.contiguous()
    chunks = list(_chunks(num_rows, weight.shape[0], hidden.element_size()))
    # Rows as long as 16 bytes allow, which is what TMA reads.
    buffer = hidden.new_empty(num_rows, cdiv(chunks[0][1], 8) * 8)
    stride = buffer.shape[1]
    kind = _kind(hidden, weight)
    tma = kind == "tma"
    for start, stop in chunks:
        columns, block = stop - start, weight[start:stop]
        _launch(kernels.grad_logits_kernel, _GRAD_LOGITS_TILES[kind], hidden, num_rows, columns, width)(
            hidden, block, targets, lse, grad_lse, grad_target_logits, buffer,
            num_rows, columns, width, vocab_start + start, stride, TMA=tma,
        )  # fmt: skip
        if needs_hidden:
            _launch(kernels.matmul_kernel, _MATMUL_TILES[kind], hidden, num_rows, width, columns)(
                buffer, block, grad_hidden, num_rows, width, columns, stride, width,
                TRANS_A=False, ADD=start > 0, TMA=tma,
            )  # fmt: skip
        if needs_weight:
            _launch(kernels.matmul_kernel, _MATMUL_TILES[kind], hidden, columns, width, num_rows)(
                buffer, hidden, grad_weight[start:stop], columns, width, num_rows, stride, width,
                TRANS_A=True, ADD=False, TMA=tma,
            )  # fmt: skip
    return grad_hidden.to(dtype), grad_weight
