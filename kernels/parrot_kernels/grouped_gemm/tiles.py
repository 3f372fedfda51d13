"""What the Triton kernels of `grouped_gemm` and `expert_mlp` share: tiles of ragged groups, loads by TMA or pointers.

A kernel walks output tiles in a persistent loop. Group bounds are read on the device: every program counts the tiles of
all groups once and finds the group of each of its tiles by comparing with the running total.
Descriptors of TMA are made by the kernels. The scratch memory that these need comes from `parrot_kernels.launches`,
which every launcher goes through.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from parrot_kernels import tile_choice, triton_support
from parrot_kernels.tile_choice import Tile, Tiles, product_tile

# How a row of the product finds its row of x: in place; every group reads all rows (dense experts); through the plan.
IN_PLACE = tl.constexpr(0)
EVERY_ROW = tl.constexpr(1)
PLANNED = tl.constexpr(2)

SCALE_BLOCK = tl.constexpr(128)  # numbers of float8 in a row that share a scale

# Tile rows that share their columns of w before the next columns come: both then stay in the L2 cache.
TILE_GROUP = tl.constexpr(8)


@triton.jit
def group_bounds(group, offsets_ptr, num_groups, rows, x_rows, rows_per_segment, SOURCE: tl.constexpr):
    """First row of `group` and one past its last; group number `num_groups` is the padding, later ones are empty."""
    group = tl.cast(group, tl.int64)
    if SOURCE == EVERY_ROW:
        lo = group * x_rows
        hi = lo + x_rows
    else:
        lo = tl.load(offsets_ptr + group, mask=group <= num_groups, other=0).to(tl.int64) * rows_per_segment
        hi = tl.load(offsets_ptr + group + 1, mask=group < num_groups, other=0).to(tl.int64) * rows_per_segment
        hi = tl.where(group == num_groups, rows, hi)
    return lo, tl.where(group <= num_groups, tl.minimum(hi, rows), lo)


@triton.jit
def tile_position(tile, tiles_m, tiles_n):
    """Row and column of a tile in a grid [tiles_m, tiles_n], TILE_GROUP tile rows at a time."""
    width = TILE_GROUP * tiles_n
    first = tile // width * TILE_GROUP
    height = tl.minimum(tiles_m - first, TILE_GROUP)
    return first + tile % width % height, tile % width // height


@triton.jit
def source_rows(rows, lo, hi, plan_ptr, topk, rows_per_segment, SOURCE: tl.constexpr):
    """Rows of x behind the given rows of the product (int64); any valid row for those past `hi`."""
    if SOURCE == EVERY_ROW:
        source = rows - lo
    elif SOURCE == PLANNED:
        segment = tl.load(plan_ptr + rows // rows_per_segment, mask=rows < hi, other=0).to(tl.int64) // topk
        source = segment * rows_per_segment + rows % rows_per_segment
    else:
        source = rows
    return source


@triton.jit
def load_tile(ptr, rows, cols, row_mask, width):
    """[rows, cols] of a matrix of `width` columns, zeros past its columns and where `row_mask` is false."""
    mask = row_mask[:, None] & (cols < width)[None, :]
    return tl.load(ptr + rows[:, None] * width + cols[None, :], mask=mask, other=0.0)


@triton.jit
def plane_descriptor(ptr, planes, height, width, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """TMA over [planes, height, width]; a block stays inside its plane, zeros past its edges."""
    row = tl.cast(width, tl.int64)  # a plane may have 2**31 elements and more
    return tl.make_tensor_descriptor(
        ptr, [planes, height, width], [height * row, row, 1], [1, BLOCK_HEIGHT, BLOCK_WIDTH]
    )


@triton.jit
def load_plane(desc, plane, row, col, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Block at (row, col) of one plane, by TMA."""
    return desc.load([plane, row, col]).reshape(BLOCK_HEIGHT, BLOCK_WIDTH)


@triton.jit
def load_weights(ptr, desc, plane, n, k, N, K, TRANS: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """Tile [BLOCK_K, BLOCK_N] at (k, n) of one plane of w: [K, N], or [N, K] with TRANS. Zeros past K (and N)."""
    ks, ns = k + tl.arange(0, BLOCK_K), n + tl.arange(0, BLOCK_N)
    base = ptr + tl.cast(plane, tl.int64) * N * K
    if TMA and TRANS:
        tile = load_plane(desc, plane, n, k, BLOCK_N, BLOCK_K).T
    elif TMA:
        tile = load_plane(desc, plane, k, n, BLOCK_K, BLOCK_N)
    elif TRANS:
        tile = load_tile(base, ns.to(tl.int64), ks, ns < N, K).T
    else:
        tile = load_tile(base, ks.to(tl.int64), ns, ks < K, N)
    return tile


@triton.jit
def ragged_descriptor(ptr, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """TMA over the rows before any `hi` of a matrix of `width` columns: see `load_ragged`."""
    # Pointers wrap around at 2**64 bytes, so 2**30 steps of (2**34 - width) and 2**30 steps of width cancel.
    step = tl.cast(width, tl.int64)
    return tl.make_tensor_descriptor(
        ptr,
        [0x7FFF0000, 0x7FFF0000, 0x40000000, width],
        [tl.full([], 2**34, tl.int64) - step, step, step, 1],
        [1, 1, BLOCK_ROWS, BLOCK_WIDTH],
    )


@triton.jit
def load_ragged(desc, hi, row, col, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Block at (row, col), zeros in rows past `hi`: the hardware's bound, counted back from 2**30, is put at hi."""
    hi, row = hi.to(tl.int32), row.to(tl.int32)
    block = desc.load([0x40000000, hi, 0x40000000 - hi + row, col])
    return block.reshape(BLOCK_ROWS, BLOCK_WIDTH)


@triton.jit
def add_product(
    acc, a, b, a_scale_ptr, rows, row_mask, b_scale_ptr, plane, n, k, N, K, BLOCK_N: tl.constexpr
):  # fmt: skip
    """acc + a @ b, columns k of `rows` times columns k of the rows n of a plane [N, K] of weights.

    Operands in float8 come with scales: of a for each row and SCALE_BLOCK columns, of b for each SCALE_BLOCK rows and
    columns of a plane. The columns of a step have one scale.
    """
    if a_scale_ptr is None:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        depth, block = tl.cdiv(K, SCALE_BLOCK), k // SCALE_BLOCK
        a_scale = tl.load(a_scale_ptr + rows * depth + block, mask=row_mask, other=0.0)
        ns = n + tl.arange(0, BLOCK_N)
        line = tl.cast(plane, tl.int64) * tl.cdiv(N, SCALE_BLOCK) + ns // SCALE_BLOCK
        b_scale = tl.load(b_scale_ptr + line * depth + block, mask=ns < N, other=0.0)
        acc += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four parts of the columns, from left to right."""
    left, right = halves(tile, ROWS, COLUMNS)
    first, second = halves(left, ROWS, COLUMNS // 2)
    third, fourth = halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def eighths(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Eight parts of the columns, from left to right."""
    left, right = halves(tile, ROWS, COLUMNS)
    a, b, c, d = quarters(left, ROWS, COLUMNS // 2)
    e, f, g, h = quarters(right, ROWS, COLUMNS // 2)
    return a, b, c, d, e, f, g, h


@triton.jit
def sigmoid(x):
    """Of float32; exp overflows to infinity for very negative x, which gives the right limit 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@functools.cache
def _has_tma(device: int) -> bool:
    """Whether the current device, of this number, has TMA (the interpreter has)."""
    return triton_support.INTERPRETING or driver.active.get_current_target().arch >= 90


def tma_reads(*matrices: Tensor) -> bool:
    """Whether the device has TMA, and these row-major tensors of rows of whole 16 bytes are where it can read them."""
    for matrix in matrices:
        if matrix.data_ptr() % 16 or not matrix.numel():
            return False
    return triton_support.INTERPRETING or _has_tma(driver.active.get_current_device())


def product_kind(element_size: int, by_tma: bool, *widths: int) -> str:
    """Which list of tiles fits.

    Args:
        element_size: of the operands.
        by_tma: `tma_reads` of them.
        widths: of the rows of the operands, and of the result if it is stored in their type.

    Returns:
        "fp8", "fp32" (products run without tensor cores there, and TMA would gain nothing), "tma" or "pointer", or
        "unaligned" for two-byte rows that are no multiple of 16 bytes. Single elements are moved then, each with an
        address of its own: large tiles would need too many registers.
    """
    if element_size != 2:
        return "fp8" if element_size == 1 else "fp32"
    if any(width % 8 for width in widths):
        return "unaligned"
    return "tma" if by_tma else "pointer"


def product_tiles(choices: Mapping[str, Sequence[Tile]]) -> dict[str, Tiles]:
    """The tiles of a product by kind."""
    return tile_choice.tables(choices, product_tile(32, 32, 32, warps=4, stages=1))
