"""`swiglu` with one weight a row, against PyTorch and Liger.

python -m benchmarks.bench_swiglu [--device cuda] [--json FILE]
pytest benchmarks/bench_swiglu.py --benchmark-json=b.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.peers import library
from benchmarks.workload import Contender, Cost, Grads, Inputs, Maker, Pass, Prepared, Run, Workload, itemsize
from parrot_sys.ops import swiglu

# Rows and width: what Qwen3-30B-A3B's experts, Parrot-7B's dense experts (4 images) and a 14B language model make.
SHAPES = {"qwen3_30b_a3b": (262_144, 768), "parrot_7b_b4_dense": (4 * 577, 24_576), "qwen1_5_14b": (8192, 13_696)}
CPU_SHAPES = {"cpu": (96, 80)}


def _ours(inputs: Inputs) -> Run:
    return lambda: (swiglu(inputs["z"], inputs["weights"]),)


def _torch(inputs: Inputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        gate, up = inputs["z"].unbind(1)
        return (F.silu(gate) * up * inputs["weights"].to(gate.dtype)[:, None],)

    return run


def _liger(inputs: Inputs) -> Prepared:
    """Liger's has no weights, and takes gate and up as two tensors."""
    function = library("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    leaves = [part.detach().contiguous().requires_grad_() for part in inputs["z"].unbind(1)]
    return Prepared(run=lambda: (function.apply(*leaves),), leaves=leaves, merge=_no_gradients)


def _no_gradients(grads: Grads) -> Grads:
    return [None, None]


def _workload(name: str, rows: int, width: int, device: str) -> Workload:
    size = itemsize(device)
    return Workload(
        op="swiglu",
        name=name,
        sizes={"J": rows, "I": width},
        weights=lambda make: {},
        data=lambda make: _data(make, rows, width),
        ours=_ours,
        # Liger leaves out the weights, which are the difference that the check would find.
        peers={"torch": Contender(build=_torch), "liger_unweighted": Contender(build=_liger, checked="nothing")},
        costs={
            "fwd": Cost(flops=8 * rows * width, bytes=3 * rows * width * size + 4 * rows),
            "bwd": Cost(flops=20 * rows * width, bytes=5 * rows * width * size + 8 * rows),
        },
        leaves=("z", "weights"),
        terms=width,
        wanted={"fwd": {"share": 0.85}, "bwd": {"share": 0.85}},
    )


def _data(make: Maker, rows: int, width: int) -> Inputs:
    return {"z": make.normal(rows, 2, width), "weights": make.probabilities(8, rows)[0]}


def workloads(device: str) -> list[Workload]:
    """Wide and narrow rows."""
    shapes = CPU_SHAPES if device == "cpu" else SHAPES
    return [_workload(name, *shape, device) for name, shape in shapes.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_swiglu(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
