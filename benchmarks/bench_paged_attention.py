"""`paged_attention`: the next row of many answers to a paged cache, against SDPA on caches without blocks.

python -m benchmarks.bench_paged_attention [--device cuda] [--json FILE]
pytest benchmarks/bench_paged_attention.py --benchmark-json=b.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import CPU_PAGED_ATTENTION, PAGED_ATTENTION, AttentionShape
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_sys.ops import paged_attention

BLOCK = 16
"""Rows of a block."""


def _ours(inputs: Inputs) -> Run:
    caches = [inputs[name] for name in ("query", "key_cache", "value_cache")]
    places = [inputs[name] for name in ("block_tables", "cu_seqlens_q", "kv_lengths")]
    scale = caches[0].shape[-1] ** -0.5
    return lambda: paged_attention(*caches, *places, max_seqlen_q=1, scale=scale)[:1]


def _contiguous(inputs: Inputs) -> Run:
    """SDPA on a copy of the cache in which each request's rows lie together; the copy is not measured."""
    tables = inputs["block_tables"].long()
    key, value = (inputs[name][tables].transpose(1, 2).flatten(2, 3) for name in ("key_cache", "value_cache"))
    query = inputs["query"][:, :, None]

    def run() -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, :, 0],)

    return run


def _workload(name: str, shape: AttentionShape, device: str) -> Workload:
    blocks = shape.length // BLOCK
    size, rows = itemsize(device), shape.samples * shape.length

    def data(make: Maker) -> Inputs:
        cache = (shape.samples * blocks, shape.kv_heads, BLOCK, shape.width)
        order = torch.arange(shape.samples * blocks, device=make.device, dtype=torch.int32)
        return {
            "query": make.normal(shape.samples, shape.heads, shape.width),
            "key_cache": make.normal(*cache),
            "value_cache": make.normal(*cache),
            "block_tables": order.view(blocks, shape.samples).T.contiguous(),  # the blocks of a request lie apart
            "cu_seqlens_q": torch.arange(shape.samples + 1, device=make.device, dtype=torch.int32),
            "kv_lengths": torch.full((shape.samples,), shape.length, device=make.device, dtype=torch.int32),
        }

    return Workload(
        op="paged_attention",
        name=name,
        sizes={"S": shape.samples, "L": shape.length, "n": shape.heads, "g": shape.kv_heads, "d": shape.width},
        weights=lambda make: {},
        data=data,
        ours=_ours,
        peers={"sdpa_contiguous": Contender(build=_contiguous, backward=False)},
        costs={
            "fwd": Cost(
                flops=4 * rows * shape.heads * shape.width,
                bytes=size * (2 * rows * shape.kv_heads + 2 * shape.samples * shape.heads) * shape.width,
            )
        },
        terms=shape.length,
        roundings=8,
    )


def workloads(device: str) -> list[Workload]:
    """Answers of a model with grouped heads, and of one without."""
    shapes = CPU_PAGED_ATTENTION if device == "cpu" else PAGED_ATTENTION
    return [_workload(name, shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_paged_attention(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
