"""`few_rows_linear`: the linear layers of a step of answers, against PyTorch's calls one after the other.

python -m benchmarks.bench_few_rows_linear [--device cuda] [--json FILE]
pytest benchmarks/bench_few_rows_linear.py --benchmark-json=b.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.workload import Contender, Cost, Inputs, Pass, Run, Workload, itemsize
from parrot_sys.ops import few_rows_linear

EPS = 1e-6
# Rows, inputs and outputs: queries, keys and values, and the LM head of the demo; those of a 7B model.
CPU_SHAPES = {"demo_qkv_b1": (1, 192, 576), "demo_head_b1": (1, 192, 6144), "demo_head_b16": (16, 192, 6144)}
SHAPES = {"qwen1_5_7b_qkv_b16": (16, 4096, 12_288)}


def _ours(inputs: Inputs) -> Run:
    tensors = (inputs["x"], inputs["weight"])
    return lambda: (few_rows_linear(*tensors, norm=inputs["norm"], residual=inputs["residual"], eps=EPS),)


def _torch(inputs: Inputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        rows = F.rms_norm(inputs["x"], inputs["norm"].shape, inputs["norm"], EPS)
        return (F.linear(rows, inputs["weight"]) + inputs["residual"],)

    return run


def _workload(name: str, rows: int, depth: int, width: int, device: str) -> Workload:
    size = itemsize(device)
    return Workload(
        op="few_rows_linear",
        name=name,
        sizes={"M": rows, "K": depth, "N": width},
        weights=lambda make: {"weight": make.normal(width, depth), "norm": make.normal(depth)},
        data=lambda make: {"x": make.normal(rows, depth), "residual": make.normal(rows, width)},
        ours=_ours,
        peers={"torch": Contender(build=_torch, backward=False)},
        costs={
            "fwd": Cost(
                flops=2 * rows * depth * width, bytes=size * ((width + 1) * depth + rows * depth + 2 * rows * width)
            )
        },
        terms=depth,
        roundings=8,
    )


def workloads(device: str) -> list[Workload]:
    """One row and many, narrow and wide layers."""
    shapes = CPU_SHAPES if device == "cpu" else SHAPES
    return [_workload(name, *shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_few_rows_linear(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
