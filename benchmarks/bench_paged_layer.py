"""`paged_layer`: the next row of answers through a whole decoder layer, against the calls that it is made of.

python -m benchmarks.bench_paged_layer [--device cuda] [--json FILE]
pytest benchmarks/bench_paged_layer.py --benchmark-json=b.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_sys.modules.rotary import rotary_cos_sin, turn, turning
from parrot_sys.ops import paged_attention
from parrot_sys.ops.paged_layer import LayerWeights, paged_layer

EPS, BLOCK = 1e-6, 16


@dataclass(frozen=True)
class Shape:
    """Answers of one row, each after `length` rows; g key heads of width d with r query heads each."""

    answers: int
    length: int
    hidden: int
    groups: int
    repeat: int
    width: int
    ffn: int

    @property
    def mixed(self) -> int:
        """Columns of queries, keys and values."""
        return self.groups * (self.repeat + 2) * self.width


CPU_SHAPES = {"demo_b1": Shape(1, 128, 192, 2, 2, 48, 512), "demo_b16": Shape(16, 128, 192, 2, 2, 48, 512)}
SHAPES = {"qwen2_7b_b16": Shape(16, 1024, 3584, 4, 7, 128, 18_944)}


def make_weights(make: Maker, shape: Shape) -> Inputs:
    """Of the layer; products of order one."""
    heads = shape.groups * shape.repeat * shape.width
    return {
        "norm_1": make.normal(shape.hidden),
        "w_qkv": make.normal(shape.mixed, shape.hidden, scale=shape.hidden**-0.5),
        "w_out": make.normal(shape.hidden, heads, scale=heads**-0.5),
        "norm_2": make.normal(shape.hidden),
        "w_gate_up": make.normal(2 * shape.ffn, shape.hidden, scale=shape.hidden**-0.5),
        "w_down": make.normal(shape.hidden, shape.ffn, scale=shape.ffn**-0.5),
    }


def make_data(make: Maker, shape: Shape) -> Inputs:
    """Rows, rotations, caches, and where the rows are."""
    blocks, device = shape.length // BLOCK, make.device
    order = torch.arange(shape.answers * blocks, device=device, dtype=torch.int32)
    tables = order.view(blocks, shape.answers).T.contiguous()  # the blocks of a request lie apart
    hidden = make.normal(shape.answers, shape.hidden)
    positions = torch.full((shape.answers,), shape.length - 1, device=device)
    cos, sin = turning(*rotary_cos_sin(positions, shape.width, base=1e4, dtype=hidden.dtype))
    caches = (shape.answers * blocks, shape.groups, BLOCK, shape.width)
    return {
        "hidden": hidden,
        "cos": cos,
        "sin": sin,
        "key_cache": make.normal(*caches),
        "value_cache": make.normal(*caches),
        "blocks": tables[:, -1].long(),
        "offsets": torch.full((shape.answers,), BLOCK - 1, device=device),
        "block_tables": tables,
        "cu_seqlens_q": torch.arange(shape.answers + 1, device=device, dtype=torch.int32),
        "kv_lengths": torch.full((shape.answers,), shape.length, device=device, dtype=torch.int32),
    }


def ours(inputs: Inputs) -> Run:
    """`paged_layer`."""
    weights = LayerWeights(**{name: inputs.get(name) for name in LayerWeights._fields})
    names = (("cos", "sin"), ("key_cache", "value_cache"), ("blocks", "offsets"))
    pairs = [(inputs[first], inputs[second]) for first, second in names]
    requests = inputs["block_tables"], inputs["cu_seqlens_q"], inputs["kv_lengths"]
    scale = inputs["key_cache"].shape[-1] ** -0.5
    return lambda: (paged_layer(inputs["hidden"], weights, *pairs, requests, eps=EPS, scale=scale),)


def calls(inputs: Inputs) -> Run:
    """PyTorch's calls around `paged_attention`."""
    hidden, keys, values = inputs["hidden"], inputs["key_cache"], inputs["value_cache"]
    requests = inputs["block_tables"], inputs["cu_seqlens_q"], inputs["kv_lengths"]
    groups, width = keys.shape[1], keys.shape[3]

    def run() -> tuple[Tensor, ...]:
        rows = F.rms_norm(hidden, inputs["norm_1"].shape, inputs["norm_1"], EPS)
        heads = F.linear(rows, inputs["w_qkv"]).view(len(hidden), groups, -1, width)
        turned = turn(heads[:, :, :-1], inputs["cos"], inputs["sin"])
        keys[inputs["blocks"], :, inputs["offsets"]] = turned[:, :, -1]
        values[inputs["blocks"], :, inputs["offsets"]] = heads[:, :, -1]
        query = turned[:, :, :-1].flatten(1, 2)
        read, _ = paged_attention(query, keys, values, *requests, max_seqlen_q=1, scale=width**-0.5)
        attended = torch.addmm(hidden, read.flatten(1), inputs["w_out"].t())
        rows = F.rms_norm(attended, inputs["norm_2"].shape, inputs["norm_2"], EPS)
        gate, up = F.linear(rows, inputs["w_gate_up"]).chunk(2, dim=-1)
        return (torch.addmm(attended, F.silu(gate) * up, inputs["w_down"].t()),)

    return run


def _workload(name: str, shape: Shape, device: str) -> Workload:
    weights = shape.hidden * (shape.mixed + shape.groups * shape.repeat * shape.width + 3 * shape.ffn)
    cached = 2 * shape.answers * shape.length * shape.groups * shape.width
    return Workload(
        op="paged_layer",
        name=name,
        sizes={"S": shape.answers, "L": shape.length, "H": shape.hidden, "g": shape.groups, "d": shape.width},
        weights=lambda make: make_weights(make, shape),
        data=lambda make: make_data(make, shape),
        ours=ours,
        peers={"calls": Contender(build=calls, backward=False)},
        costs={
            "fwd": Cost(
                flops=2 * shape.answers * weights + 2 * cached * shape.repeat,
                bytes=itemsize(device) * (weights + cached + 2 * shape.answers * shape.hidden),
            )
        },
        terms=max(shape.hidden, shape.ffn),
        roundings=12,
    )


def workloads(device: str) -> list[Workload]:
    """One answer and many."""
    shapes = CPU_SHAPES if device == "cpu" else SHAPES
    return [_workload(name, shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_paged_layer(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
