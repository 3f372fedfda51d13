"""Triton kernels of `linear_cross_entropy`; `triton_impl` launches them.

Programs are persistent: each takes one output tile after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from parrot_kernels.grouped_gemm.tiles import tile_position

# L label rows, H hidden_size


@triton.jit
def _load(ptr, desc, row, column, height, width, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """[HEIGHT, WIDTH] at (row, column) of a row-major matrix; zeros outside of it."""
    if TMA:
        tile = desc.load([row, column])
    else:
        rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        mask = (rows < height)[:, None] & (columns < width)[None, :]
        tile = tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _describe(ptr, height, width, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    desc = None
    if TMA:
        desc = tl.make_tensor_descriptor(ptr, [height, width], [tl.cast(stride, tl.int64), 1], [HEIGHT, WIDTH])
    return desc


@triton.jit
def _product(
    acc, a_ptr, a_desc, b_ptr, b_desc, m, n, M, N, K, stride_a, stride_b,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the tile at (m, n) of a @ b; a is [M, K] or, with TRANS_A, [K, M]; b is [K, N] or, with TRANS_B, [N, K]."""
    for k in range(0, K, BLOCK_K):
        if TRANS_A:
            a = _load(a_ptr, a_desc, k, m, K, M, stride_a, BLOCK_K, BLOCK_M, TMA).T
        else:
            a = _load(a_ptr, a_desc, m, k, M, K, stride_a, BLOCK_M, BLOCK_K, TMA)
        if TRANS_B:
            b = _load(b_ptr, b_desc, n, k, N, K, stride_b, BLOCK_N, BLOCK_K, TMA).T
        else:
            b = _load(b_ptr, b_desc, k, n, K, N, stride_b, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _target_columns(targets_ptr, rows, num_rows, vocab_start, num_columns):
    """Column of each row's target in a vocabulary slice, -1 when it is elsewhere."""
    columns = tl.load(targets_ptr + rows, mask=rows < num_rows, other=-1) - vocab_start
    return tl.where((rows < num_rows) & (columns >= 0) & (columns < num_columns), columns, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "vocab_start"])
def fwd_kernel(
    hidden_ptr, weight_ptr, targets_ptr, tops_ptr, totals_ptr, target_logits_ptr, num_rows, num_columns, H, vocab_start,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tops and totals are [tiles of the vocabulary, L]; target_logits must hold zeros."""
    hidden_desc = _describe(hidden_ptr, num_rows, H, H, BLOCK_M, BLOCK_K, TMA)
    weight_desc = _describe(weight_ptr, num_columns, H, H, BLOCK_N, BLOCK_K, TMA)
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        logits = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), hidden_ptr, hidden_desc, weight_ptr, weight_desc, m, n,
            num_rows, num_columns, H, H, H, False, True, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        inside = rows < num_rows
        target = _target_columns(targets_ptr, rows, num_rows, vocab_start, num_columns)
        target_logits = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where(columns[None, :] < num_columns, logits, float("-inf"))
        top = tl.max(logits, 1)
        at = tile_n.to(tl.int64) * num_rows + rows
        tl.store(tops_ptr + at, top, mask=inside)
        tl.store(totals_ptr + at, tl.sum(tl.exp(logits - top[:, None]), 1), mask=inside)
        # The targets of a row are in one tile at most.
        tl.store(target_logits_ptr + rows, target_logits, mask=(target >= n) & (target < n + BLOCK_N))


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(tops_ptr, totals_ptr, lse_ptr, num_rows, num_tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """lse[l] = log of the sum over tiles t of totals[t, l] * exp(tops[t, l])."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for begin in range(0, num_tiles, TILES):
        tiles = begin + tl.arange(0, TILES)
        mask = (tiles < num_tiles)[:, None] & (rows < num_rows)[None, :]
        at = tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        tops = tl.load(tops_ptr + at, mask=mask, other=float("-inf"))
        totals = tl.load(totals_ptr + at, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        # Only rows that do not exist have no logits at all.
        base = tl.where(rows < num_rows, new_top, 0.0)
        total = total * tl.exp(top - base) + tl.sum(totals * tl.exp(tops - base[None, :]), 0)
        top = new_top
    tl.store(lse_ptr + rows, top + tl.log(total), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "vocab_start"])
def grad_logits_kernel(
    hidden_ptr, weight_ptr, targets_ptr, lse_ptr, grad_lse_ptr, grad_target_ptr, grad_logits_ptr,
    num_rows, num_columns, H, vocab_start, stride,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_logits is [L, chunk of the vocabulary], its rows `stride` apart; lse is that of the whole vocabulary."""
    hidden_desc = _describe(hidden_ptr, num_rows, H, H, BLOCK_M, BLOCK_K, TMA)
    weight_desc = _describe(weight_ptr, num_columns, H, H, BLOCK_N, BLOCK_K, TMA)
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        logits = _product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), hidden_ptr, hidden_desc, weight_ptr, weight_desc, m, n,
            num_rows, num_columns, H, H, H, False, True, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        inside = rows < num_rows
        target = _target_columns(targets_ptr, rows, num_rows, vocab_start, num_columns)
        lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
        grad_lse = tl.load(grad_lse_ptr + rows, mask=inside, other=0.0)
        grad_target = tl.load(grad_target_ptr + rows, mask=inside, other=0.0)
        grad = tl.exp(logits - lse[:, None]) * grad_lse[:, None]
        grad += tl.where(columns[None, :] == target[:, None], grad_target[:, None], 0.0)
        at = grad_logits_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        mask = inside[:, None] & (columns < num_columns)[None, :]
        tl.store(at, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "K"])
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_a, stride_b,
    TRANS_A: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a @ b, or with ADD out += a @ b; a is [M, K] or, with TRANS_A, [K, M]; b is [K, N]."""
    if TRANS_A:
        a_desc = _describe(a_ptr, K, M, stride_a, BLOCK_K, BLOCK_M, TMA)
    else:
        a_desc = _describe(a_ptr, M, K, stride_a, BLOCK_M, BLOCK_K, TMA)
    b_desc = _describe(b_ptr, K, N, stride_b, BLOCK_K, BLOCK_N, TMA)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        # (Added at the end it would take as many registers again as acc.)
        acc = tl.load(at, mask=mask, other=0.0) if ADD else tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = _product(
            acc, a_ptr, a_desc, b_ptr, b_desc, m, n, M, N, K, stride_a, stride_b, TRANS_A, False, TMA,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)
