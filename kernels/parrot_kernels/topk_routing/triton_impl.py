"""Triton `topk_routing`: one launch when one program can hold all rows in reach, else three; one launch backward.

Each program takes a range of rows, a tile at a time: scores, K rounds of "largest key, then smaller index", weights,
and the rank of each choice among its own rows' choices of the same expert. Since a row chooses an expert at most once,
that rank is a running sum down the column of the expert, and the plan is a stable counting sort without atomics: the
second launch turns each program's counts into first positions (and sums the statistics in the order of the programs),
the third writes the plan. A single program does the second and third step at its end.

Columns of a tile are experts, padded so that every expert group fills a power of two; their order is that of the
experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.launches import launch
from parrot_kernels.tile_choice import cdiv, next_power_of_2

# n rows, E experts, K topk; C columns: E padded

_MAX_COLUMNS = 1024
_TILE = 1024  # elements of a tile: 8 for each thread
_ONE_PROGRAM = 16384  # elements of all rows that one program routes faster than three launches do
_THREADS = 128
_EPSILON = tl.constexpr(1e-20)


def why_not(*args: object) -> str | None:
    """Needs a GPU or the interpreter, at most 32 bits, and rows that fit a tile."""
    if reason := triton_support.why_not(*args):
        return reason
    if args and isinstance(logits := args[0], Tensor):
        num_groups = args[5] if len(args) > 5 else 1
        assert isinstance(num_groups, int), f"num_groups must be an int, got {num_groups!r}"
        columns = _columns(logits.shape[1], num_groups)
        if columns[0] * columns[1] > _MAX_COLUMNS:
            return f"a row of {logits.shape[1]} experts in {num_groups} groups needs more than {_MAX_COLUMNS} columns"
    return None


def _columns(num_experts: int, num_groups: int) -> tuple[int, int]:
    """Groups and experts of a group, both padded to powers of two."""
    return next_power_of_2(num_groups), next_power_of_2(num_experts // num_groups)


@triton.jit
def _sortable(values):
    """int32 that order as the float32 `values` do: -0 equals 0, NaN is the largest; all above the least int32."""
    values = tl.where(values == 0.0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, 0x7FFFFFFF, bits)


@triton.jit
def _scores(logits, exists, SIGMOID: tl.constexpr):
    """Softmax or sigmoid of the rows of a tile (0 where not `exists`), their softmax and their log-sum-exp."""
    logits = tl.where(exists, logits, -float("inf"))
    top = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - top[:, None])
    total = tl.sum(exponentials, axis=1)
    softmax = exponentials / total[:, None]
    scores = tl.where(exists, 1.0 / (1.0 + tl.exp(-logits)), 0.0) if SIGMOID else softmax
    return scores, softmax, top + tl.log(total)


@triton.jit
def _group_scores(values, exists, BEST: tl.constexpr):
    """[N, G] sums of the BEST largest of the values [N, G, I]."""
    REMOVED: tl.constexpr = -2147483648
    keys = tl.where(exists, _sortable(values), REMOVED)
    members = tl.arange(0, values.shape[2])[None, None, :]
    sums = tl.zeros((values.shape[0], values.shape[1]), dtype=tl.float32)
    for _ in tl.static_range(BEST):
        member = tl.argmax(keys, axis=2)[:, :, None]
        sums += tl.sum(tl.where(members == member, values, 0.0), axis=2)
        keys = tl.where(members == member, REMOVED, keys)
    return sums


@triton.jit
def _best_groups(values, exists, G: tl.constexpr, TOPK_GROUPS: tl.constexpr, BEST: tl.constexpr, BLOCK_G: tl.constexpr):
    """[N, C] bool: columns of the TOPK_GROUPS best groups of each row."""
    REMOVED: tl.constexpr = -2147483648
    N: tl.constexpr = values.shape[0]
    BLOCK_I: tl.constexpr = values.shape[1] // BLOCK_G
    values = tl.reshape(tl.where(exists, values, 0.0), (N, BLOCK_G, BLOCK_I))
    exists = tl.reshape(exists.to(tl.int32), (N, BLOCK_G, BLOCK_I)) > 0
    groups = tl.arange(0, BLOCK_G)[None, :]
    keys = tl.where(groups < G, _sortable(_group_scores(values, exists, BEST)), REMOVED)
    chosen = tl.zeros((N, BLOCK_G), dtype=tl.int32)
    for _ in tl.static_range(TOPK_GROUPS):
        best = groups == tl.argmax(keys, axis=1)[:, None]
        chosen = tl.where(best, 1, chosen)
        keys = tl.where(best, REMOVED, keys)
    chosen = tl.broadcast_to(chosen[:, :, None], (N, BLOCK_G, BLOCK_I))
    return tl.reshape(chosen, (N, BLOCK_G * BLOCK_I)) > 0


@triton.jit
def _select(keys, topk_indices_ptr, rows, columns, experts, present, K: tl.constexpr):
    """Writes the K best experts of each row; returns the slot of each column [N, C], K where it was not chosen."""
    REMOVED: tl.constexpr = -2147483648
    slots = tl.full(keys.shape, K, dtype=tl.int32)
    for k in range(K):
        best = columns[None, :] == tl.argmax(keys, axis=1)[:, None]
        slots = tl.where(best, k, slots)
        keys = tl.where(best, REMOVED, keys)
        expert = tl.sum(tl.where(best, experts[None, :], 0), axis=1)
        tl.store(topk_indices_ptr + rows.to(tl.int64) * K + k, expert.to(tl.int64), mask=present)
    return slots


@triton.jit
def _write_plan(indices_ptr, ranks_ptr, first_ptr, plan_ptr, begin, end, K: tl.constexpr, BLOCK: tl.constexpr):
    """Puts the choices of the rows [begin, end) where `first_ptr` [E] and their ranks say."""
    for start in range(begin * K, end * K, BLOCK):
        choices = start + tl.arange(0, BLOCK)
        mask = choices < end * K
        expert = tl.load(indices_ptr + choices, mask=mask, other=0)
        first = tl.load(first_ptr + expert, mask=mask, other=0)
        rank = tl.load(ranks_ptr + choices, mask=mask, other=0)
        tl.store(plan_ptr + (first + rank), choices.to(tl.int64), mask=mask)


@triton.jit
def _write_offsets(counts_ptr, offsets_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Exclusive prefix sums [E + 1] of the counts."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    tl.store(offsets_ptr + 1 + experts, tl.cumsum(counts, axis=0), mask=experts < E)
    tl.store(offsets_ptr, 0)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _fwd_kernel(
    logits_ptr, bias_ptr, probs_ptr, scores_ptr, lse_ptr, indices_ptr, ranks_ptr, counts_ptr, score_sums_ptr,
    z_sums_ptr, offsets_ptr, plan_ptr, num_rows, rows_per_program, stride, scaling_factor,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TOPK_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr, SINGLE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything of the rows of one program; counts and sums go to row `program` of their tables."""
    REMOVED: tl.constexpr = -2147483648
    C: tl.constexpr = BLOCK_G * BLOCK_I
    program = tl.program_id(0)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    columns = tl.arange(0, C)
    experts = columns // BLOCK_I * (E // G) + columns % BLOCK_I
    real = (columns % BLOCK_I < E // G) & (columns // BLOCK_I < G)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + experts, mask=real, other=0.0).to(tl.float32)
    counts = tl.zeros((C,), dtype=tl.int32)
    score_sums = tl.zeros((C,), dtype=tl.float32)
    z_sum = 0.0
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        present = rows < end
        inside = present[:, None] & real[None, :]
        at = rows.to(tl.int64)[:, None] * stride + experts[None, :]
        logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
        exists = tl.broadcast_to(real[None, :], (BLOCK_N, C))
        scores, _, lse = _scores(logits, exists, SIGMOID)
        if bias_ptr is not None:
            keys = scores + bias[None, :]
            values = keys
        else:
            keys = logits
            values = logits if RENORMALIZE and not SIGMOID else scores
        keys = _sortable(keys)
        if G > 1:
            BEST: tl.constexpr = K // TOPK_GROUPS if K > TOPK_GROUPS else 1
            allowed = exists & _best_groups(values, exists, G, TOPK_GROUPS, BEST, BLOCK_G)
        else:
            allowed = exists
        slots = _select(tl.where(allowed, keys, REMOVED), indices_ptr, rows, columns, experts, present, K)
        chosen = slots < K
        weights = tl.where(chosen, scores, 0.0)
        if RENORMALIZE:
            weights = weights / (tl.sum(weights, axis=1) + _EPSILON)[:, None]
        shares = scores
        if SIGMOID:
            shares = scores / (tl.sum(scores, axis=1) + _EPSILON)[:, None]
        at = rows.to(tl.int64)[:, None] * E + experts[None, :]
        tl.store(probs_ptr + at, weights * scaling_factor, mask=inside)
        tl.store(scores_ptr + at, scores, mask=inside)
        tl.store(lse_ptr + rows, lse, mask=present)
        score_sums += tl.sum(tl.where(inside, shares, 0.0), axis=0)
        z_sum += tl.sum(tl.where(present, lse * lse, 0.0), axis=0)
        counted = (chosen & inside).to(tl.int32)
        ranks = counts[None, :] + tl.cumsum(counted, axis=0) - counted
        tl.store(ranks_ptr + rows.to(tl.int64)[:, None] * K + slots, ranks, mask=counted > 0)
        counts += tl.sum(counted, axis=0)
    tl.store(counts_ptr + program.to(tl.int64) * E + experts, counts, mask=real)
    tl.store(score_sums_ptr + program.to(tl.int64) * E + experts, score_sums, mask=real)
    tl.store(z_sums_ptr + program, z_sum)
    if SINGLE:
        # What other threads of this program stored is read back.
        tl.debug_barrier()
        _write_offsets(counts_ptr, offsets_ptr, E, BLOCK_E)
        tl.debug_barrier()
        _write_plan(indices_ptr, ranks_ptr, offsets_ptr, plan_ptr, begin, end, K, BLOCK)


@triton.jit(do_not_specialize=["num_programs"])
def _totals_kernel(
    counts_ptr, score_sums_ptr, z_sums_ptr, tokens_ptr, score_sum_ptr, z_sum_ptr, num_programs,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_E experts: sums over the programs; counts become the ranks at which each program starts."""
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.zeros((BLOCK_E,), dtype=tl.int32)
    score_sum = tl.zeros((BLOCK_E,), dtype=tl.float32)
    z_sum = 0.0
    for start in range(0, num_programs, BLOCK_P):
        programs = start + tl.arange(0, BLOCK_P)
        at = programs.to(tl.int64)[:, None] * E + experts[None, :]
        mask = (programs < num_programs)[:, None] & (experts < E)[None, :]
        counts = tl.load(counts_ptr + at, mask=mask, other=0)
        tl.store(counts_ptr + at, tokens[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        tokens += tl.sum(counts, axis=0)
        score_sum += tl.sum(tl.load(score_sums_ptr + at, mask=mask, other=0.0), axis=0)
        z_sum += tl.sum(tl.load(z_sums_ptr + programs, mask=programs < num_programs, other=0.0), axis=0)
    tl.store(tokens_ptr + experts, tokens, mask=experts < E)
    tl.store(score_sum_ptr + experts, score_sum, mask=experts < E)
    tl.store(z_sum_ptr, z_sum, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def _plan_kernel(
    indices_ptr, ranks_ptr, counts_ptr, tokens_ptr, offsets_ptr, plan_ptr, num_rows, rows_per_program,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the plan of the rows that the same program of `_fwd_kernel` took; program 0 writes the offsets too."""
    program = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    tokens = tl.load(tokens_ptr + experts, mask=experts < E, other=0)
    firsts = counts_ptr + program.to(tl.int64) * E
    first = tl.load(firsts + experts, mask=experts < E, other=0)
    tl.store(firsts + experts, first + tl.cumsum(tokens, axis=0) - tokens, mask=experts < E)
    if program == 0:
        _write_offsets(tokens_ptr, offsets_ptr, E, BLOCK_E)
    tl.debug_barrier()
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    _write_plan(indices_ptr, ranks_ptr, firsts, plan_ptr, begin, end, K, BLOCK)


@triton.jit
def _through_division(grads, values, mask):
    """Gradient of `values` from that of `values / (their row's sum + epsilon)`, over the columns in `mask`."""
    values = tl.where(mask, values, 0.0)
    total = (tl.sum(values, axis=1) + _EPSILON)[:, None]
    mean = tl.sum(values * tl.where(mask, grads, 0.0), axis=1)[:, None] / total
    return (grads - mean) / total


@triton.jit(do_not_specialize=["num_rows"])
def _bwd_kernel(
    grad_probs_ptr, grad_scores_ptr, grad_lse_ptr, grad_score_sums_ptr, grad_z_sum_ptr, logits_ptr, indices_ptr,
    grad_logits_ptr, num_rows, stride, scaling_factor,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, C)
    present = rows < num_rows
    exists = tl.broadcast_to((experts < E)[None, :], (BLOCK_N, C))
    inside = present[:, None] & exists
    at = rows.to(tl.int64)[:, None] * E + experts[None, :]
    logits = rows.to(tl.int64)[:, None] * stride + experts[None, :]
    logits = tl.load(logits_ptr + logits, mask=inside, other=0.0).to(tl.float32)
    scores, softmax, lse = _scores(logits, exists, SIGMOID)
    grads = tl.zeros((BLOCK_N, C), dtype=tl.float32)
    if grad_scores_ptr is not None:
        grads = tl.load(grad_scores_ptr + at, mask=inside, other=0.0)
    if grad_probs_ptr is not None:
        chosen = tl.zeros((BLOCK_N, C), dtype=tl.int32)
        for k in range(K):
            expert = tl.load(indices_ptr + rows.to(tl.int64) * K + k, mask=present, other=0)
            chosen = tl.where(experts[None, :] == expert[:, None], 1, chosen)
        grad_chosen = tl.load(grad_probs_ptr + at, mask=inside & (chosen > 0), other=0.0) * scaling_factor
        if RENORMALIZE:
            grad_chosen = _through_division(grad_chosen, scores, chosen > 0)
        grads += tl.where(chosen > 0, grad_chosen, 0.0)
    if grad_score_sums_ptr is not None:
        grad_shares = tl.load(grad_score_sums_ptr + experts, mask=experts < E, other=0.0)
        grad_shares = tl.broadcast_to(grad_shares[None, :], (BLOCK_N, C))
        if SIGMOID:
            grad_shares = _through_division(grad_shares, scores, exists)
        grads += grad_shares
    grads = tl.where(exists, grads, 0.0)
    grads = scores * (grads * (1.0 - scores) if SIGMOID else grads - tl.sum(scores * grads, axis=1)[:, None])
    if grad_lse_ptr is not None:
        grads += tl.load(grad_lse_ptr + rows, mask=present, other=0.0)[:, None] * softmax
    if grad_z_sum_ptr is not None:
        grads += (2.0 * tl.load(grad_z_sum_ptr) * lse)[:, None] * softmax
    tl.store(grad_logits_ptr + at, grads, mask=inside)


def _row_stride(logits: Tensor) -> tuple[Tensor, int]:
    """Logits with a contiguous last dimension, and the distance of their rows."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return logits, logits.stride(0)


def topk_routing_fwd(
    logits: Tensor,
    topk: int,
    renormalize: bool,
    score_function: str = "softmax",
    scaling_factor: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    logits, stride = _row_stride(logits)
    rows, num_experts = logits.shape
    block_g, block_i = _columns(num_experts, num_groups)
    block_n = max(1, _TILE // (block_g * block_i))
    single = rows * block_g * block_i <= _ONE_PROGRAM
    most = 1 if single else 4 * triton_support.num_processors(logits.device)
    rows_per_program = cdiv(cdiv(rows, most), block_n) * block_n
    num_programs = 1 if single else cdiv(rows, rows_per_program)

    def floats(*sizes: int) -> Tensor:
        return logits.new_empty(sizes, dtype=torch.float32)

    def integers(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return logits.new_empty(sizes, dtype=dtype)

    probs, scores, lse = floats(rows, num_experts), floats(rows, num_experts), floats(rows)
    score_sums, z_sum = floats(num_experts), floats()
    indices, plan = integers(rows, topk, dtype=torch.int64), integers(rows * topk, dtype=torch.int64)
    tokens, offsets, ranks = integers(num_experts), integers(num_experts + 1), integers(rows * topk)
    if single:  # its sums are the totals
        sums: tuple[Tensor, ...] = (tokens, score_sums, z_sum)
    else:
        sums = integers(num_programs, num_experts), floats(num_programs, num_experts), floats(num_programs)
    bias = None if expert_bias is None else expert_bias.contiguous()
    sizes: dict[str, Any] = {"E": num_experts, "K": topk, "BLOCK_E": next_power_of_2(num_experts), "BLOCK": 512}
    launch(_fwd_kernel, (num_programs,))(
        logits, bias, probs, scores, lse, indices, ranks, *sums, offsets, plan, rows, rows_per_program, stride,
        scaling_factor, **sizes, G=num_groups, TOPK_GROUPS=topk_groups, SIGMOID=score_function == "sigmoid",
        RENORMALIZE=renormalize, SINGLE=single, BLOCK_G=block_g, BLOCK_I=block_i, BLOCK_N=block_n,
        num_warps=_THREADS // 32,
    )  # fmt: skip
    if not single:
        block_e = min(16, sizes["BLOCK_E"])
        launch(_totals_kernel, (cdiv(num_experts, block_e),))(
            *sums, tokens, score_sums, z_sum, num_programs, E=num_experts, BLOCK_E=block_e, BLOCK_P=128
        )
        launch(_plan_kernel, (num_programs,))(
            indices, ranks, sums[0], tokens, offsets, plan, rows, rows_per_program, **sizes
        )  # fmt: skip
    return probs, scores, lse, score_sums, z_sum, indices, tokens, offsets, plan


def topk_routing_bwd(
    grad_probs: Tensor | None,
    grad_scores: Tensor | None,
    grad_lse: Tensor | None,
    grad_score_sums: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    topk_indices: Tensor,
    renormalize: bool,
    score_function: str,
    scaling_factor: float,
) -> Tensor:
    """See the contract in the package docstring."""
    logits, stride = _row_stride(logits)
    rows, num_experts = logits.shape
    grad_logits = logits.new_empty((rows, num_experts))
    columns = next_power_of_2(num_experts)
    block_n = max(1, _TILE // columns)
    grads = (grad_probs, grad_scores, grad_lse, grad_score_sums, grad_z_sum)
    if rows:
        launch(_bwd_kernel, (cdiv(rows, block_n),))(
            *(None if grad is None else grad.contiguous() for grad in grads),
            logits, topk_indices, grad_logits, rows, stride, scaling_factor,
            E=num_experts, K=topk_indices.shape[1], SIGMOID=score_function == "sigmoid", RENORMALIZE=renormalize,
            C=columns, BLOCK_N=block_n, num_warps=_THREADS // 32,
        )  # fmt: skip
    return grad_logits
