"""Choosing among the tile sizes of a kernel: by a formula of the shapes on the host, never by timing.

Timing would stall every step that brings a new number of images, could end differently on each rank, and is impossible
while a CUDA graph is captured. The formula counts waves: a processor takes one output tile after the other, so a pass
lasts as long as the processor with the most tiles. What a tile costs follows from its products and from what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parrot_kernels import env

_INTERPRETING = env.triton_interpret()

# What one multiprocessor does in a clock, as the model takes it; the products are those of Hopper's data sheet, the
# rest is assumed and not measured. Only ratios matter.
_PRODUCTS = 2048  # multiply-adds of two-byte numbers
_CACHE_BYTES = 48  # from and to the second-level cache
_EXPONENTIALS = 16
_START = 1500  # until the first products of a tile, and from the last ones to the next tile


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One choice of a kernel's block sizes, with the warps and pipeline stages that go with it.

    Equal to itself only, which makes it a quick key.
    """

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 3

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}


Tiles = tuple[Tile, ...]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` takes ten times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()


def product_tile(rows: int, columns: int, depth: int, *, warps: int, stages: int) -> Tile:
    """Tile of a product: BLOCK_M rows and BLOCK_N columns of the result, BLOCK_K columns of the operands a step."""
    return Tile(sizes={"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}, warps=warps, stages=stages)


def tables(choices: Mapping[str, Sequence[Tile]], interpreted: Tile) -> dict[str, Tiles]:
    """The tiles of each kind; in the interpreter a small one, so that tests meet edges."""
    return {kind: (interpreted,) if _INTERPRETING else tuple(own) for kind, own in choices.items()}


def cheapest(tiles: Tiles, cost: Callable[[Tile], float]) -> Tile:
    """The tile that costs least, the first of equals: a function of the shapes alone, the same on all ranks."""
    return tiles[0] if len(tiles) == 1 else min(tiles, key=cost)


def product_cost(
    tile: Tile, count: int, depth: int, processors: int, *, element_size: int = 2, results: int = 1
) -> float:
    """Clocks of a product of `count` output tiles, one at a time on each of `processors`.

    Args:
        tile: block sizes.
        count: output tiles, those that are only partly filled too: they cost as much as full ones.
        depth: length of the sums.
        processors: multiprocessors.
        element_size: bytes of an operand's element.
        results: products that share the rows of a tile (2: gate and up).
    """
    rows, columns, step = tile["BLOCK_M"], results * tile["BLOCK_N"], tile["BLOCK_K"]
    products = rows * columns * step / _PRODUCTS
    reads = (rows + columns) * step * element_size / _CACHE_BYTES
    stores = rows * columns * element_size / _CACHE_BYTES
    waves = math.ceil(count / processors)
    return waves * (_START + math.ceil(depth / step) * max(products, reads) + stores)


def ragged_blocks(rows: int, groups: int, segments: int, block: int) -> int:
    """Blocks of rows that groups of unknown sizes are expected to need: each of those in use ends half way in one."""
    used = min(groups, segments)
    return max(used, math.ceil(rows / block + used / 2))


def resident_programs(tile: Tile) -> int:
    """Programs of attention that share a multiprocessor: blocks of four warps in pairs."""
    return max(1, 8 // tile.warps)


def attention_cost(
    tile: Tile, own: str, own_rows: int, other: str, other_rows: int, heads: int, width: int, processors: int
) -> float:
    """Clocks of attention whose programs own `tile[own]` of `own_rows` and pass over the others, `tile[other]` a step.

    `heads` counts heads and samples.
    """
    resident = resident_programs(tile)
    waves = math.ceil(math.ceil(own_rows / tile[own]) * heads / (processors * resident))
    pairs = tile[own] * tile[other]
    step = 2 * pairs * width / _PRODUCTS + pairs / _EXPONENTIALS
    return waves * resident * (_START + math.ceil(other_rows / tile[other]) * step)
