"""Which tile a product of `grouped_gemm` or `expert_mlp` takes and on how many programs.

Each function returns the tile and the number of programs. `choices` come from `tile_choice.tables`; the other arguments
are numbers of rows, columns and groups, the length of the sums (`depth`), bytes of an element, and multiprocessors.
"""

from __future__ import annotations

from parrot_kernels.tile_choice import Tile, Tiles, cdiv, cheapest, product_cost, ragged_blocks


def m_tile(
    choices: Tiles,
    rows: int,
    columns: int,
    depth: int,
    groups: int,
    rows_per_segment: int | None,
    element_size: int,
    results: int,
    processors: int,
) -> tuple[Tile, int]:
    """Of a product of ragged groups of rows; `rows_per_segment` None: each group takes all rows.

    The sizes of groups are on the device: the host knows how many output tiles there may be.
    """

    def count(tile: Tile) -> int:
        block = tile["BLOCK_M"]
        blocks = (
            groups * cdiv(rows // groups, block)
            if rows_per_segment is None
            else ragged_blocks(rows, groups, rows // rows_per_segment, block)
        )
        return blocks * cdiv(columns, tile["BLOCK_N"])

    def cost(tile: Tile) -> float:
        return product_cost(tile, count(tile), depth, processors, element_size=element_size, results=results)

    tile = cheapest(choices, cost)
    # An upper bound: each group, the padding too, ends with at most one tile row that is cut.
    most = (rows // tile["BLOCK_M"] + groups + 1) * cdiv(columns, tile["BLOCK_N"])
    return tile, min(processors, most)


def k_tile(
    choices: Tiles, rows: int, columns: int, depth: int, groups: int, element_size: int, processors: int
) -> tuple[Tile, int]:
    """Of the products [columns, depth] of ragged groups, sums over their rows."""

    def count(tile: Tile) -> int:
        return groups * cdiv(columns, tile["BLOCK_M"]) * cdiv(depth, tile["BLOCK_N"])

    def cost(tile: Tile) -> float:
        mean_rows = cdiv(rows, max(1, groups))
        return product_cost(tile, count(tile), mean_rows, processors, element_size=element_size)

    tile = cheapest(choices, cost)
    return tile, min(processors, count(tile))


def combine_tile(
    choices: Tiles, images: int, rows: int, columns: int, depth: int, element_size: int, processors: int
) -> tuple[Tile, int]:
    """Of one product an image, whose tiles end with the image."""

    def count(tile: Tile) -> int:
        return images * cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"])

    def cost(tile: Tile) -> float:
        return product_cost(tile, count(tile), depth, processors, element_size=element_size)

    tile = cheapest(choices, cost)
    return tile, min(processors, count(tile))
