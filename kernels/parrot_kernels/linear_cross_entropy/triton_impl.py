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
import triton
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.grouped_gemm.tiles import config, set_tma_allocator, tile_kind
from parrot_kernels.linear_cross_entropy import kernels

# L label rows, H hidden_size, N vocabulary rows held here, B columns of a chunk

CHUNK_BYTES = 256 * 2**20  # of gradients of logits that exist at a time
MIN_CHUNK = 1024

_Sizes = tuple[int, int, int, int, int]


def _tuned(kernel: Any, key: list[str], choices: dict[str, list[_Sizes]], **options: Any) -> dict[str, Any]:
    """`kernel` for each kind of tile, tuned by (M, N, K, warps, stages) for each `key`; small in the interpreter."""
    if triton_support.INTERPRETING:
        choices = {kind: [(16, 32, 32, 4, 1)] for kind in choices}
    configs = {kind: [config(m, n, k, warps=w, stages=s) for m, n, k, w, s in own] for kind, own in choices.items()}
    return {kind: triton.autotune(own, key=key, **options)(kernel) for kind, own in configs.items()}


# All of a kind have the same N: the forward pass allocates by the number of tiles along the vocabulary.
_fwd = _tuned(
    kernels.fwd_kernel,
    ["H"],
    {
        "tma": [(128, 256, 128, 8, 2)],
        "pointer": [(128, 128, 32, 8, 4)],
        "fp32": [(64, 64, 16, 4, 2)],
    },
)
_grad_logits = _tuned(
    kernels.grad_logits_kernel,
    ["H"],
    {
        "tma": [(128, 256, 64, 8, 4), (64, 256, 64, 4, 4)],
        "pointer": [(128, 128, 32, 8, 4), (64, 128, 32, 4, 4)],
        "fp32": [(64, 64, 16, 4, 2)],
    },
)
_matmul = _tuned(
    kernels.matmul_kernel,
    ["N", "TRANS_A", "ADD"],
    {
        "tma": [(128, 128, 128, 8, 2), (128, 128, 64, 8, 4)],
        "pointer": [(64, 128, 32, 4, 4), (64, 64, 32, 4, 4)],
        "fp32": [(64, 64, 16, 4, 2)],
    },
    restore_value=["out_ptr"],  # it may add to it
)


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs."""
    return triton_support.why_not(*args)


def _grid(device: torch.device, rows: int, columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """As many programs as run at a time, or as there are tiles."""
    processors = triton_support.num_processors(device)
    return lambda meta: (min(processors, triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"])),)


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
    kind = tile_kind(hidden, weight)
    num_tiles = triton.cdiv(num_columns, _fwd[kind].configs[0].kwargs["BLOCK_N"])
    tops, totals = lse.new_empty(num_tiles, num_rows), lse.new_empty(num_tiles, num_rows)
    set_tma_allocator(hidden.device)
    _fwd[kind][_grid(hidden.device, num_rows, num_columns)](
        hidden, weight, targets, tops, totals, target_logits, num_rows, num_columns, width, vocab_start,
        TMA=kind == "tma",
    )  # fmt: skip
    rows, tiles = 32, 64
    kernels.combine_kernel[(triton.cdiv(num_rows, rows),)](
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
    dtype, device = hidden.dtype, hidden.device
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    if not num_rows:
        return grad_hidden.to(dtype), grad_weight.zero_()
    hidden, weight = hidden.contiguous(), weight.contiguous()
    grad_lse, grad_target_logits = grad_lse.contiguous(), grad_target_logits.contiguous()
    chunks = list(_chunks(num_rows, weight.shape[0], hidden.element_size()))
    # Rows as long as 16 bytes allow, which is what TMA reads.
    buffer = hidden.new_empty(num_rows, triton.cdiv(chunks[0][1], 8) * 8)
    stride = buffer.shape[1]
    kind = tile_kind(hidden, weight)
    tma = kind == "tma"
    set_tma_allocator(device)
    for start, stop in chunks:
        columns, block = stop - start, weight[start:stop]
        _grad_logits[kind][_grid(device, num_rows, columns)](
            hidden, block, targets, lse, grad_lse, grad_target_logits, buffer,
            num_rows, columns, width, vocab_start + start, stride, TMA=tma,
        )  # fmt: skip
        if needs_hidden:
            _matmul[kind][_grid(device, num_rows, width)](
                buffer, block, grad_hidden, num_rows, width, columns, stride, width,
                TRANS_A=False, ADD=start > 0, TMA=tma,
            )  # fmt: skip
        if needs_weight:
            _matmul[kind][_grid(device, columns, width)](
                buffer, hidden, grad_weight[start:stop], columns, width, num_rows, stride, width,
                TRANS_A=True, ADD=False, TMA=tma,
            )  # fmt: skip
    return grad_hidden.to(dtype), grad_weight
