"""Stage `bench`: every workload of `benchmarks/bench_*.py`, one row for each of our back ends and each peer."""

from __future__ import annotations

import functools
import gc
import itertools
from typing import Any

import torch

from benchmarks import (
    bench_expert_mlp,
    bench_few_rows_linear,
    bench_fp8_experts,
    bench_grouped_gemm,
    bench_linear_cross_entropy,
    bench_moe_layer,
    bench_paged_attention,
    bench_paged_layer,
    bench_permute,
    bench_router_attention,
    bench_segment_attention,
    bench_swiglu,
    bench_text_guided_routing,
    bench_topk_routing,
)
from benchmarks.measure import measure
from benchmarks.workload import Cost, Inputs, Pass, Run, Unavailable, Workload, itemsize

MODULES = (
    bench_expert_mlp,
    bench_grouped_gemm,
    bench_text_guided_routing,
    bench_topk_routing,
    bench_moe_layer,
    bench_router_attention,
    bench_linear_cross_entropy,
    bench_swiglu,
    bench_permute,
    bench_segment_attention,
    bench_paged_attention,
    bench_paged_layer,
    bench_few_rows_linear,
    bench_fp8_experts,
)
WORKERS = 1
ROW_SECONDS = 150
# What decides the table of the README: they come first, and the first call on a machine makes no others.
DECISIVE = (
    "moe_layer/parrot_7b_b4_dense/auto",
    "moe_layer/parrot_7b_b4_dense/released_loop",
    "expert_mlp/parrot_7b_b4_dense/cuda",
    "expert_mlp/parrot_7b_b4_dense/cublas_bound",
    "expert_mlp/parrot_7b_b4_dense/triton",
    "grouped_gemm/parrot_7b_b4_top2_up/cuda",
    "text_guided_routing/parrot_7b_b4_q128/cuda",
    "topk_routing/qwen3_30b_a3b/cuda",
    "router_attention/wings_7b/triton",
    "linear_cross_entropy/parrot_7b/triton",
)


def _ceilings(device: str) -> list[Workload]:
    """What the machine itself reaches: a large product and a large copy."""
    width, numbers = (256, 2**20) if device == "cpu" else (8192, 2**32)
    size = itemsize(device)

    def matmul(inputs: Inputs) -> Run:
        return lambda: (inputs["a"] @ inputs["b"],)

    def copy(inputs: Inputs) -> Run:
        out = torch.empty_like(inputs["a"])
        return lambda: (out.copy_(inputs["a"]),)

    common: dict[str, Any] = {"op": "ceiling", "weights": lambda make: {}, "peers": {}, "backends": ("torch",)}
    return [
        Workload(
            name="matmul",
            sizes={"M": width, "N": width, "K": width},
            data=lambda make: {"a": make.normal(width, width), "b": make.normal(width, width)},
            ours=matmul,
            costs={"fwd": Cost(flops=2 * width**3, bytes=3 * size * width**2)},
            terms=width,
            **common,
        ),
        Workload(
            name="copy",
            sizes={"numbers": numbers},
            data=lambda make: {"a": make.normal(numbers)},
            ours=copy,
            costs={"fwd": Cost(flops=0, bytes=2 * size * numbers)},
            terms=1,
            **common,
        ),
    ]


@functools.cache
def workloads(device: str) -> dict[str, Workload]:
    """All of them by id: one of each op in turn, so that a run that is cut off has seen every op."""
    turns = itertools.zip_longest(*(module.workloads(device) for module in MODULES))
    found = [*_ceilings(device), *(workload for turn in turns for workload in turn if workload is not None)]
    return {workload.id: workload for workload in found}


def rows(device: str) -> list[str]:
    """`op/name/contender`; those of DECISIVE first, then by workload."""
    found = [
        f"{name}/{contender}"
        for name, workload in workloads(device).items()
        for contender in (*workload.our_contenders(device), *workload.peers)
    ]
    return sorted(found, key=lambda row: DECISIVE.index(row) if row in DECISIVE else len(DECISIVE))


def decisive_rows(device: str) -> list[str]:
    """As many as DECISIVE has: these, or in a rehearsal on a CPU, whose workloads have other names, the first ones."""
    return rows(device)[: len(DECISIVE)]


def find(row: str, device: str) -> tuple[Workload, str, Pass]:
    """Workload, contender and pass of `op/name/contender/pass`."""
    name, contender, which = row.rsplit("/", 2)
    workload = workloads(device)[name]
    passes = {key: key for key in workload.costs}
    return workload, contender, passes[which]  # type: ignore[index]


def run_row(row: str, device: str) -> dict[str, Any]:
    """Times and rates of one contender.

    Raises:
        Unavailable: it cannot run here.
        Mismatch: its result is not ours.
    """
    name, contender = row.rsplit("/", 1)
    workload = workloads(device)[name]
    try:
        measured = measure(workload, contender, device, seconds=0.01 if device == "cpu" else 0.25)
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"needs more memory than there is: {error}") from error
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    ours = contender not in workload.peers
    return {"sizes": dict(workload.sizes), "ours": ours, "wanted": workload.wanted if ours else {}, **measured}
