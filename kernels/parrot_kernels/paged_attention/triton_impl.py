"""Triton `paged_attention`: one program for a tile of rows, a key head and a request, block after block of its table.

The query heads of a key head are rows of the tile, so that tensor cores have something to do when a request has one
query row, and each key is read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import attention_tiles as tiles
from parrot_kernels import triton_support
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import Tile, Tiles, attention_cost, cdiv, cheapest

# n query heads in groups of GROUP that share a key head; N rows of a block, at least 16 for the tensor cores.
# In kernels: M rows of a tile, row i of it is head i % GROUP of query row i // GROUP; WIDTH <= D columns of a head.

_TILES: Tiles = (
    (Tile(sizes={"M": 16}),)
    if triton_support.INTERPRETING
    else (Tile(sizes={"M": 16}, warps=4, stages=3), Tile(sizes={"M": 64}, warps=4, stages=2))
)


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs, heads of at most 256 columns, and blocks of 16, 32, 64, ... rows."""
    reason = tiles.why_not(*args)
    if reason or not args:
        return reason
    key_cache = args[1]
    assert isinstance(key_cache, Tensor), f"the second argument must be the cache, got {type(key_cache).__name__}"
    _, _, size, width = key_cache.shape
    if size < 16 or size & (size - 1):
        return f"its blocks have 16, 32, 64 or more rows, a power of two, got {size}"
    limit = 64 * 1024
    used = 4 * size * tiles.tile_width(width) * key_cache.element_size()
    return None if used <= limit else f"four blocks of keys take at most {limit} bytes, got {used}: use smaller blocks"


@triton.jit(do_not_specialize=["table_width", "num_rows", "num_columns"])
def _paged_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, bounds_ptr, lengths_ptr, columns_ptr, visible_ptr, out_ptr, extra_ptr,
    stride_qt, stride_qh, stride_block, table_width, num_rows, num_columns, scale2,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    request, group = tl.program_id(2), tl.program_id(1)
    first = tl.load(bounds_ptr + request)
    count = tl.load(bounds_ptr + request + 1) - first
    item = tl.program_id(0) * M + tl.arange(0, M)
    inside = item < count * GROUP
    if tl.program_id(0) * M >= count * GROUP:
        return
    row, head = first + item // GROUP, group * GROUP + item % GROUP
    length = tl.load(lengths_ptr + request)
    position = length - count + item // GROUP
    columns = tl.arange(0, D)
    q_at = q_ptr + row.to(tl.int64)[:, None] * stride_qt + head.to(tl.int64)[:, None] * stride_qh + columns[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (columns[None, :] < WIDTH), other=0.0)

    zeros = tl.zeros([M], tl.float32)
    top, total, extra0, extra1 = zeros - float("inf"), zeros, zeros, zeros
    acc = tl.zeros([M, D], tl.float32)
    last = tl.minimum(length, length - count + (tl.program_id(0) * M + M - 1) // GROUP + 1)
    for start in tl.range(0, last, N):
        block = tl.load(table_ptr + request.to(tl.int64) * table_width + start // N).to(tl.int64)
        rows = tl.arange(0, N)
        keys = start + rows
        at = block * stride_block + group * N * WIDTH
        # Rows of the last block that nobody wrote may hold anything.
        k = tiles.load_rows(k_ptr + at, rows, WIDTH, length - start, True, WIDTH, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = (keys[None, :] <= position[:, None]) & (keys[None, :] < length)
        if visible_ptr is not None:
            seen = seen & (tl.load(visible_ptr + block * N + rows) != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale2)
        # A row that has seen nothing yet has -inf, and -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scale2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if columns_ptr is not None:
            column0, column1 = tiles.load_key_columns(columns_ptr, keys, length, 0, num_columns)
            extra0 = extra0 * shrink + tl.sum(p * column0[None, :], 1)
            extra1 = extra1 * shrink + tl.sum(p * column1[None, :], 1)
        v = tiles.load_rows(v_ptr + at, rows, WIDTH, length - start, True, WIDTH, D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    places = (row.to(tl.int64) * tl.num_programs(1) * GROUP + head) * WIDTH
    mask = inside[:, None] & (columns[None, :] < WIDTH)
    tl.store(out_ptr + places[:, None] + columns[None, :], (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask)
    if columns_ptr is not None:
        tiles.store_pairs(extra_ptr, head.to(tl.int64) * num_rows + row, inside, extra0 * inverse, extra1 * inverse)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    columns: Tensor | None,
    visible: Tensor | None,
    max_seqlen_q: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    num_rows, num_heads, width = query.shape
    groups, block_size = key_cache.shape[1:3]
    requests, table_width = block_tables.shape
    out = query.new_empty(query.shape)
    extra = query.new_empty((num_heads, num_rows, 2) if columns is not None else 0, dtype=torch.float32)
    if num_rows:
        repeat = num_heads // groups
        rows, keys = max_seqlen_q * repeat, table_width * block_size
        processors = triton_support.num_processors(query.device)
        sizes = {"GROUP": repeat, "WIDTH": width, "D": tiles.tile_width(width), "N": block_size}

        def cost(tile: Tile) -> float:
            both = Tile(sizes={"M": tile["M"], "N": block_size}, warps=tile.warps)
            return attention_cost(both, "M", rows, "N", keys, groups * requests, sizes["D"], processors)

        tile = cheapest(_TILES, cost)
        launch(_paged_kernel, (cdiv(rows, tile["M"]), groups, requests), tile, _TILES)(
            query, key_cache, value_cache, block_tables.contiguous(), cu_seqlens_q, kv_lengths,
            None if columns is None else columns.contiguous(), None if visible is None else visible.view(torch.uint8),
            out, extra, *query.stride()[:2], key_cache.stride(0), table_width, num_rows,
            0 if columns is None else columns.shape[0], scale * tiles.LOG2_E.value, **sizes,
        )  # fmt: skip
    return out, extra
