"""`segment_attention`: text rows to the tokens of their image, against a dense mask and a loop over samples.

python -m benchmarks.bench_segment_attention [--device cuda] [--json FILE]
pytest benchmarks/bench_segment_attention.py --benchmark-json=b.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import CPU_SEGMENT_ATTENTION, SEGMENT_ATTENTION, AttentionShape
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_sys.ops import segment_attention

LEAVES = ("query", "key", "value")


def _ours(inputs: Inputs) -> Run:
    query, key, value, start, end = (inputs[name] for name in (*LEAVES, "kv_start", "kv_end"))
    return lambda: segment_attention(query, key, value, start, end, scale=query.shape[-1] ** -0.5)[:1]


def _dense_mask(inputs: Inputs) -> Run:
    """SDPA over all keys of the pack with a mask."""
    keys = torch.arange(len(inputs["key"]), device=inputs["key"].device)
    mask = (keys >= inputs["kv_start"][:, None]) & (keys < inputs["kv_end"][:, None])

    def run() -> tuple[Tensor, ...]:
        query, key, value = (inputs[name].transpose(0, 1)[None] for name in LEAVES)
        return (F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0].transpose(0, 1),)

    return run


def _batched(shape: AttentionShape) -> Callable[[Inputs], Run]:
    """SDPA sample by sample in one call, which samples of equal length with one image each allow."""

    def build(inputs: Inputs) -> Run:
        def run() -> tuple[Tensor, ...]:
            query, key, value = (inputs[name].unflatten(0, (shape.samples, -1)).transpose(1, 2) for name in LEAVES)
            return (F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1),)

        return run

    return build


def _workload(name: str, shape: AttentionShape, device: str) -> Workload:
    rows, keys = shape.samples * shape.length, shape.samples * shape.keys
    size, q, kv = itemsize(device), rows * shape.heads * shape.width, keys * shape.kv_heads * shape.width
    products = rows * shape.keys * shape.heads * shape.width

    def data(make: Maker) -> Inputs:
        start = torch.arange(shape.samples, device=make.device, dtype=torch.int32).repeat_interleave(shape.length)
        return {
            "query": make.normal(rows, shape.heads, shape.width),
            "key": make.normal(keys, shape.kv_heads, shape.width),
            "value": make.normal(keys, shape.kv_heads, shape.width),
            "kv_start": start * shape.keys,
            "kv_end": (start + 1) * shape.keys,
        }

    return Workload(
        op="segment_attention",
        name=name,
        sizes={"S": shape.samples, "L": shape.length, "M": shape.keys, "n": shape.heads, "d": shape.width},
        weights=lambda make: {},
        data=data,
        ours=_ours,
        peers={"sdpa_batched": Contender(build=_batched(shape)), "sdpa_dense_mask": Contender(build=_dense_mask)},
        costs={
            "fwd": Cost(flops=4 * products, bytes=size * (2 * q + 2 * kv)),
            "bwd": Cost(flops=10 * products, bytes=size * (4 * q + 4 * kv)),
        },
        leaves=LEAVES,
        terms=max(shape.length, shape.keys),
        roundings=8,
    )


def workloads(device: str) -> list[Workload]:
    """OpenFlamingo's 64 tokens an image, and 577."""
    shapes = CPU_SEGMENT_ATTENTION if device == "cpu" else SEGMENT_ATTENTION
    return [_workload(name, shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_segment_attention(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
