"""Forward pass of experts over images with products in float8, against the same in bfloat16.

python -m benchmarks.bench_fp8_experts [--device cuda] [--only parrot_7b_b4] [--json FILE]
pytest benchmarks/bench_fp8_experts.py --benchmark-json=b.json

Quantising x, h and both matrices is part of the time. The floor is that of bfloat16: shares may exceed 100 %.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from benchmarks.bench_expert_mlp import image_workload, ours
from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import images, sized
from benchmarks.workload import Contender, Pass, Workload


def _workload(workload: Workload, device: str) -> Workload:
    """A workload of `bench_expert_mlp` in float8. Results in bfloat16 are other numbers: they are not compared."""
    return dataclasses.replace(
        workload,
        op="fp8_experts",
        ours=functools.partial(ours, fp8=True),
        peers={"bf16_bound": Contender(build=ours, backward=False, checked="nothing")},
        costs={"fwd": workload.costs["fwd"]},
        leaves=(),
        backends=("triton",) if device == "cuda" else ("reference",),
        wanted={},
    )


def workloads(device: str) -> list[Workload]:
    """Image routing at every batch size, dense and top-2."""
    return [
        _workload(image_workload(name, sized(shape, topk=topk), device), device)
        for name, shape in images(device)
        for topk in (shape.experts, 2)
    ]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_fp8_experts(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
