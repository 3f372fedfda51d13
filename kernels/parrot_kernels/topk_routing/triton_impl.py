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

from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.launches import Launch, planned
from parrot_kernels.tile_choice import cdiv, next_power_of_2
from parrot_kernels.topk_routing.kernels import bwd_kernel, fwd_kernel, plan_kernel, totals_kernel

# n rows, E experts, K topk; C columns: E padded

_MAX_COLUMNS = 1024
_TILE = 1024  # elements of a tile: 8 for each thread
_ONE_PROGRAM = 16384  # elements of all rows that one program routes faster than three launches do
_THREADS = 128


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


def _row_stride(logits: Tensor) -> tuple[Tensor, int]:
    """Logits with a contiguous last dimension, and the distance of their rows."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return logits, logits.stride(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """The launches of a forward pass; one program alone needs only the first."""

    num_programs: int
    route: Launch
    totals: Launch | None
    plan: Launch | None


@planned
def _fwd_plan(
    rows: int,
    num_experts: int,
    topk: int,
    stride: int,
    renormalize: bool,
    score_function: str,
    scaling_factor: float,
    num_groups: int,
    topk_groups: int,
    processors: int,
) -> _Forward:
    block_g, block_i = _columns(num_experts, num_groups)
    block_n = max(1, _TILE // (block_g * block_i))
    single = rows * block_g * block_i <= _ONE_PROGRAM
    most = 1 if single else 4 * processors
    rows_per_program = cdiv(cdiv(rows, most), block_n) * block_n
    num_programs = 1 if single else cdiv(rows, rows_per_program)
    sizes = {"E": num_experts, "K": topk, "BLOCK_E": next_power_of_2(num_experts), "BLOCK": 512}
    counts = rows, rows_per_program
    options = {
        "G": num_groups, "TOPK_GROUPS": topk_groups, "SIGMOID": score_function == "sigmoid", "RENORMALIZE": renormalize,
        "SINGLE": single, "BLOCK_G": block_g, "BLOCK_I": block_i, "BLOCK_N": block_n, "num_warps": _THREADS // 32,
    }  # fmt: skip
    numbers = *counts, stride, scaling_factor
    route = Launch(fwd_kernel, (num_programs,), numbers=numbers, constants={**sizes, **options})
    totals = plan = None
    if not single:
        block_e = min(16, sizes["BLOCK_E"])
        constants = {"E": num_experts, "BLOCK_E": block_e, "BLOCK_P": 128}
        grid = (cdiv(num_experts, block_e),)
        totals = Launch(totals_kernel, grid, numbers=(num_programs,), constants=constants)
        plan = Launch(plan_kernel, (num_programs,), numbers=counts, constants=sizes)
    return _Forward(num_programs=num_programs, route=route, totals=totals, plan=plan)


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
    processors = triton_support.num_processors(logits.device)
    own = _fwd_plan(
        rows, num_experts, topk, stride, renormalize, score_function, scaling_factor, num_groups, topk_groups,
        processors,
    )  # fmt: skip
    probs = torch.empty((rows, num_experts), dtype=torch.float32, device=logits.device)
    # From one of the same dtype, which is the quickest way to an empty tensor.
    scores, lse = torch.empty_like(probs), probs.new_empty(rows)
    score_sums, z_sum = probs.new_empty(num_experts), probs.new_empty(())
    indices = torch.empty((rows, topk), dtype=torch.int64, device=logits.device)
    plan = indices.new_empty(rows * topk)
    tokens = torch.empty(num_experts, dtype=torch.int32, device=logits.device)
    offsets, ranks = tokens.new_empty(num_experts + 1), tokens.new_empty(rows * topk)
    if own.totals is None:  # the sums of a single program are the totals
        sums = tokens, score_sums, z_sum
    else:
        programs = own.num_programs
        sums = (
            tokens.new_empty(programs, num_experts),
            probs.new_empty(programs, num_experts),
            probs.new_empty(programs),
        )
    bias = None if expert_bias is None else expert_bias.contiguous()
    own.route(logits, bias, probs, scores, lse, indices, ranks, *sums, offsets, plan)
    if own.totals is not None and own.plan is not None:
        own.totals(*sums, tokens, score_sums, z_sum)
        own.plan(indices, ranks, sums[0], tokens, offsets, plan)
    return probs, scores, lse, score_sums, z_sum, indices, tokens, offsets, plan


@planned
def _bwd_launch(
    rows: int,
    num_experts: int,
    topk: int,
    stride: int,
    renormalize: bool,
    score_function: str,
    scaling_factor: float,
) -> Launch:
    columns = next_power_of_2(num_experts)
    block_n = max(1, _TILE // columns)
    constants = {
        "E": num_experts, "K": topk, "SIGMOID": score_function == "sigmoid", "RENORMALIZE": renormalize, "C": columns,
        "BLOCK_N": block_n, "num_warps": _THREADS // 32,
    }  # fmt: skip
    return Launch(bwd_kernel, (cdiv(rows, block_n),), numbers=(rows, stride, scaling_factor), constants=constants)


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
    grads = (grad_probs, grad_scores, grad_lse, grad_score_sums, grad_z_sum)
    if rows:
        topk = topk_indices.shape[1]
        own = _bwd_launch(rows, num_experts, topk, stride, renormalize, score_function, scaling_factor)
        own(*[None if grad is None else grad.contiguous() for grad in grads], logits, topk_indices, grad_logits)
    return grad_logits
