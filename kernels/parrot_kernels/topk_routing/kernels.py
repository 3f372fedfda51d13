"""Triton kernels of `topk_routing`."""

from __future__ import annotations

import triton
import triton.language as tl

# n rows, E experts, K topk; C columns: E padded

_EPSILON = tl.constexpr(1e-20)


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
def fwd_kernel(
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
def totals_kernel(
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
def plan_kernel(
    indices_ptr, ranks_ptr, counts_ptr, tokens_ptr, offsets_ptr, plan_ptr, num_rows, rows_per_program,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the plan of the rows that the same program of `fwd_kernel` took; program 0 writes the offsets too."""
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
def bwd_kernel(
    grad_probs_ptr, grad_scores_ptr, grad_lse_ptr, grad_score_sums_ptr, grad_z_sum_ptr, logits_ptr, indices_ptr,
    grad_logits_ptr, num_rows, stride, scaling_factor,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of BLOCK_N rows, whose scores it computes again."""
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
