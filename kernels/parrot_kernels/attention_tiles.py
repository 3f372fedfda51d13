"""Triton building blocks of `router_attention` and `segment_attention`: what one program does with its tile.

Query row t sees the keys of one contiguous range [start[t], end[t]), which the kernels of an op have from where the op
has it (arithmetic on boundaries, or memory). MASKED says whether a loop looks at the ranges: it need not where every
row of the tile sees every key.

Scores are in base 2: p = exp2(s * scale2 - lse2), where scale2 and lse2 are scale and lse times log2(e). So scaling and
exponential are one fused multiply-add and one instruction. Products of float32 are IEEE products, not TF32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import (
    Tile,
    Tiles,
    attention_cost,
    cdiv,
    cheapest,
    next_power_of_2,
    resident_programs,
)

# Tiles are [M, D] of query rows and [N, D] of key rows; WIDTH <= D is the width of a head. COLUMNS: there are two more
# value columns, which cost a sum along the rows of p each; widening v would cost a tensor-core tile.

TilesOfWidth = dict[int | str, Tiles]

MOST_STRIPS = 8  # of key tiles, each with its own parts of the query's gradient

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def why_not(*args: object) -> str | None:
    """Needs what every Triton kernel needs, and heads (of the first argument, [T, n, d]) that fit one tile."""
    reason = triton_support.why_not(*args)
    if reason or not args:
        return reason
    query = args[0]
    assert isinstance(query, Tensor), f"the first argument must be the query, got {type(query).__name__}"
    width, limit = query.shape[2], 512 // query.element_size()
    return None if width <= limit else f"its heads of {query.dtype} have at most {limit} columns, got {width}"


def tile_width(width: int) -> int:
    """Columns of the tiles for heads of `width`: a power of two, and what the tensor cores need at least."""
    return max(16, next_power_of_2(width))


def strides(*tensors: Tensor) -> list[int]:
    """Row and head strides of tensors [., heads, d]."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _tiles(*sizes: tuple[int, int, int, int]) -> Tiles:
    """Tiles (M, N, warps, stages); in the interpreter a small one, so that small tests have several tiles."""
    if triton_support.INTERPRETING:
        return (Tile(sizes={"M": 16, "N": 32}),)
    return tuple(Tile(sizes={"M": m, "N": n}, warps=warps, stages=stages) for m, n, warps, stages in sizes)


# Tiles by the width of the heads; float32, which has no tensor cores here, has its own, and so have heads that do not
# fill their tiles where the masks of the columns take registers that a tile lacks.
FWD_TILES: TilesOfWidth = {
    64: _tiles((128, 64, 4, 3), (128, 128, 8, 3)),
    128: _tiles((128, 64, 8, 3)),
    256: _tiles((64, 64, 8, 2)),
    "fp32": _tiles((32, 16, 8, 2), (16, 16, 4, 2)),
}
QUERY_BWD_TILES: TilesOfWidth = {
    64: _tiles((128, 64, 8, 2), (64, 64, 4, 2)),
    128: _tiles((128, 64, 8, 2), (64, 64, 8, 2)),
    256: _tiles((64, 32, 8, 2)),
    "fp32": _tiles((16, 16, 4, 2)),
}
KEY_BWD_TILES: TilesOfWidth = {
    64: _tiles((32, 128, 8, 2), (32, 64, 4, 2)),
    128: _tiles((32, 128, 8, 2), (32, 64, 8, 2)),
    "128 not filled": _tiles((16, 128, 8, 2), (32, 64, 8, 2)),
    256: _tiles((16, 64, 8, 2)),
    "fp32": _tiles((16, 16, 4, 2)),
}
# Key tiles of programs that form the query's gradient too.
STRIP_TILES: TilesOfWidth = {
    64: _tiles((32, 128, 8, 2), (32, 64, 4, 2)),
    128: _tiles((32, 128, 8, 2), (32, 64, 8, 2)),
    256: _tiles((16, 32, 8, 2)),
    "fp32": _tiles((16, 16, 4, 2)),
}


def _of_width(tiles: TilesOfWidth, query: Tensor) -> Tiles:
    """The tiles for heads of `query` [T, n, d]."""
    if query.element_size() == 4:
        return tiles["fp32"]
    width = max(64, tile_width(query.shape[2]))
    not_filled = f"{width} not filled"
    return tiles[not_filled if query.shape[2] < width and not_filled in tiles else width]


def by_rows(kernel: Any, tiles: TilesOfWidth, query: Tensor, rows: int, keys: int, *others: int) -> Callable[..., None]:
    """`kernel` with one program for each M of `rows` query rows, and each of the others (heads, samples)."""
    tile, choices = _cheapest(tiles, query, "M", rows, "N", keys, math.prod(others))
    return launch(kernel, (cdiv(rows, tile["M"]), *others), tile, choices)


def by_keys(kernel: Any, tiles: TilesOfWidth, query: Tensor, keys: int, rows: int, *others: int) -> Callable[..., None]:
    """`kernel` with one program for each N of `keys` key rows, and each of the others (key heads, samples)."""
    tile, choices = _cheapest(tiles, query, "N", keys, "M", rows, math.prod(others))
    return launch(kernel, (cdiv(keys, tile["N"]), *others), tile, choices)


def by_strips(
    kernel: Any, tiles: TilesOfWidth, query: Tensor, keys: int, rows: int, *others: int
) -> tuple[Callable[..., None], int, Tile]:
    """`kernel` with one program for each strip of key tiles, and each of the others; number of strips, and the tile.

    A program takes every tile of its strip. As few strips as keep the processors busy: each has float32 parts of its
    own of the query's gradient.
    """
    count = math.prod(others)
    tile, choices = _cheapest(tiles, query, "N", keys, "M", rows, count)
    blocks, at_once = cdiv(keys, tile["N"]), resident_programs(tile) * triton_support.num_processors(query.device)

    def steps(strips: int) -> int:
        return cdiv(strips * count, at_once) * cdiv(blocks, strips)

    strips = min(range(1, min(blocks, MOST_STRIPS) + 1), key=steps)
    return launch(kernel, (strips, *others), tile, choices), strips, tile


def _cheapest(
    tiles: TilesOfWidth, query: Tensor, own: str, own_rows: int, other: str, other_rows: int, count: int
) -> tuple[Tile, Tiles]:
    """The tile for `count` heads and samples, whose programs own `tile[own]` of `own_rows`, and what it was one of."""
    choices = _of_width(tiles, query)
    width, processors = tile_width(query.shape[2]), triton_support.num_processors(query.device)
    sizes = (own, own_rows, other, other_rows, count, width, processors)
    return cheapest(choices, lambda tile: attention_cost(tile, *sizes)), choices


@triton.jit
def load_rows(ptr, rows, stride, num_rows, MASKED: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Tile of a matrix with `num_rows` rows of WIDTH; zeros outside it."""
    columns = tl.arange(0, D)
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = columns[None, :] < WIDTH
    if MASKED:
        tile = tl.load(at, mask=(rows[:, None] < num_rows) & inside, other=0.0)
    elif WIDTH != D:
        tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(ptr, rows, stride, num_rows, values, WIDTH: tl.constexpr, D: tl.constexpr):
    """Stores a tile in the dtype behind `ptr`, and nothing outside the matrix."""
    columns = tl.arange(0, D)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_pairs(ptr, rows, inside):
    """Both numbers of rows of a contiguous [., 2] matrix as float32; zeros where not inside."""
    at = ptr + rows.to(tl.int64) * 2
    return tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(ptr, rows, inside, first, second):
    """The opposite of `load_pairs`."""
    at = ptr + rows.to(tl.int64) * 2
    tl.store(at, first.to(ptr.dtype.element_ty), mask=inside)
    tl.store(at + 1, second.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_key_columns(ptr, keys, num_keys, shift, num_columns):
    """The pair of each key: that at keys + shift, if there is one."""
    at = keys + shift
    return load_pairs(ptr, at, (keys < num_keys) & (at >= 0) & (at < num_columns))


@triton.jit
def attend(
    state, q, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt, start, end, low, high, num_keys, column_shift,
    num_columns, scale2,
    MASKED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Takes the keys [low, high) into the online softmax of a query tile.

    `state` is (top, total, acc, extra0, extra1): running maximum (base 2), sum, and sums of values not yet divided.
    """
    top, total, acc, extra0, extra1 = state
    for j0 in tl.range(low, high, N):
        keys = j0 + tl.arange(0, N)
        k = load_rows(k_ptr, keys, stride_kt, num_keys, MASKED, WIDTH, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            s = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale2)
        # A row that has seen nothing yet has -inf, and -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scale2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if COLUMNS:
            column0, column1 = load_key_columns(column_ptr, keys, num_keys, column_shift, num_columns)
            extra0 = extra0 * shrink + tl.sum(p * column0[None, :], 1)
            extra1 = extra1 * shrink + tl.sum(p * column1[None, :], 1)
        v = load_rows(v_ptr, keys, stride_vt, num_keys, MASKED, WIDTH, D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc, extra0, extra1


@triton.jit
def start_attending(M: tl.constexpr, D: tl.constexpr):
    """The state of `attend` before any key."""
    zeros = tl.zeros([M], tl.float32)
    return zeros - float("inf"), zeros, tl.zeros([M, D], tl.float32), zeros, zeros


@triton.jit
def finish_attending(state):
    """out, extra0, extra1 and lse; 0, 0, 0 and -inf for rows that saw nothing."""
    top, total, acc, extra0, extra1 = state
    total = tl.where(total > 0, total, 1.0)  # top is -inf where it was 0
    inverse = 1.0 / total
    lse = (top + tl.log2(total)) * LN_2
    return acc * inverse[:, None], extra0 * inverse, extra1 * inverse, lse


@triton.jit
def add_query_gradient(
    grad_q, q, grad_out, lse2, delta, grad_extra0, grad_extra1, k_ptr, v_ptr, column_ptr, stride_kt, stride_vt, start,
    end, low, high, num_keys, column_shift, num_columns, scale2,
    MASKED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """grad_q + what the keys [low, high) add to it, all divided by the scale of the scores."""
    for j0 in tl.range(low, high, N):
        keys = j0 + tl.arange(0, N)
        k = load_rows(k_ptr, keys, stride_kt, num_keys, MASKED, WIDTH, D)
        v = load_rows(v_ptr, keys, stride_vt, num_keys, MASKED, WIDTH, D)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse2[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None]), p, 0.0)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        if COLUMNS:
            column0, column1 = load_key_columns(column_ptr, keys, num_keys, column_shift, num_columns)
            grad_p += grad_extra0[:, None] * column0[None, :] + grad_extra1[:, None] * column1[None, :]
        grad_s = p * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
def add_key_gradients(
    state, keys, k, v, column0, column1, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_extra_ptr, start_ptr, end_ptr,
    grad_q_ptr, adds, stride_qt, stride_ot, low, high, num_rows, causal_shift, scale2,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What the query rows [low, high) of one head add to the gradients of a key tile.

    `state` is (grad_k divided by the scale, grad_v, grad_column0, grad_column1). Row i sees the keys of
    [start_ptr[i], end_ptr[i]), or those up to i + causal_shift where the pointers are None. There is no loop without a
    look at them: two loops do not fit in the registers, and this one is bound by its products.

    With `grad_q_ptr`, float32 [tiles of query rows, D, M], it gets what the key tile adds to the gradient of the query,
    divided by the scale: added where `adds` is true, else in place of what is there.
    """
    grad_k, grad_v, grad_column0, grad_column1 = state
    for i0 in tl.range(low, high, M, disable_licm=True):  # what could be computed once would take registers all along
        rows = i0 + tl.arange(0, M)
        inside = rows < num_rows
        q = load_rows(q_ptr, rows, stride_qt, num_rows, True, WIDTH, D)
        grad_out = load_rows(grad_out_ptr, rows, stride_ot, num_rows, True, WIDTH, D)
        # exp2(-inf) makes the rows that are not there 0.
        lse2 = tl.load(lse_ptr + rows, mask=inside, other=float("inf")) * LOG2_E
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse2[None, :])
        if start_ptr is None:
            p = tl.where(keys[:, None] <= rows[None, :] + causal_shift, p, 0.0)
        else:
            start = tl.load(start_ptr + rows, mask=inside, other=0)
            end = tl.load(end_ptr + rows, mask=inside, other=0)
            p = tl.where((keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :]), p, 0.0)
        grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        if COLUMNS:
            grad_extra0, grad_extra1 = load_pairs(grad_extra_ptr, rows, inside)
            grad_column0 += tl.sum(p * grad_extra0[None, :], 1)
            grad_column1 += tl.sum(p * grad_extra1[None, :], 1)
            grad_p += column0[:, None] * grad_extra0[None, :] + column1[:, None] * grad_extra1[None, :]
        grad_s = (p * (grad_p - delta[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_s, q, grad_k, input_precision="ieee")
        if grad_q_ptr is not None:
            # Transposed, since the wide side of a product has to be its rows on tensor cores.
            at = grad_q_ptr + i0 // M * (D * M) + tl.arange(0, D)[:, None] * M + tl.arange(0, M)[None, :]
            own = tl.dot(tl.trans(k), grad_s, input_precision="ieee")
            tl.store(at, tl.load(at, mask=adds, other=0.0) + own)
    return grad_k, grad_v, grad_column0, grad_column1
