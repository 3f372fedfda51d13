"""`router_attention` (causal attention with Wings' two router columns) against attention without them.

python -m benchmarks.bench_router_attention [--device cuda] [--json FILE]
pytest benchmarks/bench_router_attention.py --benchmark-json=b.json
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.peers import library
from benchmarks.shapes import CPU_ROUTER_ATTENTION, ROUTER_ATTENTION, AttentionShape
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Prepared, Run, Workload, itemsize
from parrot_sys.ops import router_attention

QKV = ("query", "key", "value")


def _ours(shape: AttentionShape) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        cu_seqlens = inputs["cu_seqlens"]
        sizes: dict[str, Any] = {
            "max_seqlen_q": shape.length,
            "max_seqlen_kv": shape.length,
            "scale": shape.width**-0.5,
        }
        query, key, value, columns = (inputs[name] for name in (*QKV, "columns"))
        return lambda: router_attention(query, key, value, columns, cu_seqlens, cu_seqlens, **sizes)[:2]

    return build


def _by_sample(inputs: Inputs, shape: AttentionShape) -> list[Tensor]:
    """query, key, value as [samples, heads, length, width]."""
    return [inputs[name].view(shape.samples, shape.length, -1, shape.width).transpose(1, 2) for name in QKV]


def _packed(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(shape: AttentionShape, backends: list[SDPBackend]) -> Callable[[Inputs], Prepared]:
    """PyTorch's fused attention: the same `out`, without the columns."""

    def build(inputs: Inputs) -> Prepared:
        leaves = [tensor.detach().contiguous().requires_grad_() for tensor in _by_sample(inputs, shape)]
        grouped = shape.heads != shape.kv_heads

        def run() -> tuple[Tensor, ...]:
            with sdpa_kernel(backends):
                query, key, value = leaves
                return (F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped),)

        return Prepared(run=run, leaves=leaves, outputs=lambda outputs: (_packed(outputs[0]),))

    return build


def _flash_attn(shape: AttentionShape) -> Callable[[Inputs], Run]:
    """The flash-attn package, packed."""

    def build(inputs: Inputs) -> Run:
        function = library("flash_attn").flash_attn_varlen_func
        cu_seqlens, tensors = inputs["cu_seqlens"], [inputs[name] for name in QKV]
        lengths = (cu_seqlens, cu_seqlens, shape.length, shape.length)
        return lambda: (function(*tensors, *lengths, causal=True),)

    return build


def _matrix(shape: AttentionShape) -> Callable[[Inputs], Run]:
    """The released way: the matrix of weights, summed over heads, times the columns."""

    def build(inputs: Inputs) -> Run:
        query, key, value = _by_sample(inputs, shape)
        later = torch.ones(shape.length, shape.length, dtype=torch.bool, device=query.device).triu(1)
        repeats = shape.heads // shape.kv_heads
        columns = inputs["columns"][: shape.length].float()

        def run() -> tuple[Tensor, ...]:
            keys, values = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
            scores = (query @ keys.transpose(2, 3)).float() * shape.width**-0.5
            weights = scores.masked_fill(later, -math.inf).softmax(-1)
            return _packed(weights.to(query.dtype) @ values), (weights.sum(1) @ columns).flatten(0, 1)

        return run

    return build


def _workload(name: str, shape: AttentionShape, device: str) -> Workload:
    rows = shape.samples * shape.length
    pairs = shape.samples * shape.length * (shape.length + 1) // 2  # that causality leaves
    size, q, kv = itemsize(device), rows * shape.heads * shape.width, rows * shape.kv_heads * shape.width

    def data(make: Maker) -> Inputs:
        tensors = {"query": make.normal(rows, shape.heads, shape.width)}
        tensors |= {name: make.normal(rows, shape.kv_heads, shape.width) for name in ("key", "value")}
        cu_seqlens = torch.arange(shape.samples + 1, device=make.device, dtype=torch.int32) * shape.length
        return tensors | {"cu_seqlens": cu_seqlens}

    return Workload(
        op="router_attention",
        name=name,
        sizes={"S": shape.samples, "L": shape.length, "n": shape.heads, "g": shape.kv_heads, "d": shape.width},
        weights=lambda make: {"columns": make.normal(shape.length, 2)},
        data=data,
        ours=_ours(shape),
        peers={
            # Their gradients are those without the columns.
            "sdpa_flash": Contender(build=_sdpa(shape, [SDPBackend.FLASH_ATTENTION]), checked="outputs"),
            "sdpa_cudnn": Contender(build=_sdpa(shape, [SDPBackend.CUDNN_ATTENTION]), checked="outputs"),
            "flash_attn": Contender(build=_flash_attn(shape), checked="outputs"),
            "matrix": Contender(build=_matrix(shape)),
        },
        costs={
            "fwd": Cost(flops=4 * pairs * shape.heads * shape.width, bytes=size * (2 * q + 2 * kv)),
            "bwd": Cost(flops=10 * pairs * shape.heads * shape.width, bytes=size * (4 * q + 4 * kv)),
        },
        leaves=(*QKV, "columns"),
        terms=shape.length * shape.heads,
        roundings=8,
        wanted={"fwd": {"x sdpa_flash": 1 / 1.10}, "bwd": {"x sdpa_flash": 1 / 1.30}},
    )


def workloads(device: str) -> list[Workload]:
    """Wings on Qwen1.5-7B, and one long sample with grouped heads."""
    shapes = CPU_ROUTER_ATTENTION if device == "cpu" else ROUTER_ATTENTION
    return [_workload(name, shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_router_attention(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
