"""`text_guided_routing`: one launch for a micro-batch, against the released code's way image by image.

python -m benchmarks.bench_text_guided_routing [--device cuda] [--json FILE]
pytest benchmarks/bench_text_guided_routing.py --benchmark-json=b.json
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import BATCHES
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_kernels.testing import make_spans
from parrot_sys.ops import text_guided_routing

LEAVES = ("query", "text", "router_weight")


def _scale(inputs: Inputs) -> float:
    return 1 / math.sqrt(inputs["query"].shape[1])


def _ours(inputs: Inputs) -> Run:
    query, text, router_weight = (inputs[name] for name in LEAVES)
    spans = inputs["start"], inputs["end"]
    return lambda: (text_guided_routing(query, text, *spans, router_weight, scale=_scale(inputs))[0],)


def _naive_loop(inputs: Inputs) -> Run:
    """Attention and router image by image."""
    query, text, router_weight = (inputs[name] for name in LEAVES)
    spans = list(zip(inputs["start"].tolist(), inputs["end"].tolist(), strict=True))

    def run() -> tuple[Tensor, ...]:
        rows = []
        for i, (first, last) in enumerate(spans):
            own = text[first:last]
            rows.append((query[i : i + 1] @ own.T * _scale(inputs)).softmax(-1) @ own @ router_weight.T)
        return (torch.cat(rows).float(),)

    return run


def _batched(inputs: Inputs) -> Run:
    """Batched products, which these texts of equal length allow."""
    query, text, router_weight = (inputs[name] for name in LEAVES)

    def run() -> tuple[Tensor, ...]:
        own = text.view(len(query), -1, text.shape[1])
        weights = (torch.bmm(own, query[:, :, None]) * _scale(inputs)).softmax(1)
        return ((torch.bmm(weights.transpose(1, 2), own).squeeze(1) @ router_weight.T).float(),)

    return run


def _workload(name: str, images: int, length: int, hidden: int, device: str) -> Workload:
    rows, experts, size = images * length, 6, itemsize(device)
    small = images * hidden + experts * hidden
    forward = Cost(flops=2 * rows * hidden * (1 + experts), bytes=size * (rows * hidden + small))
    backward = Cost(flops=4 * rows * hidden * (2 + experts), bytes=2 * forward.bytes)

    def data(make: Maker) -> Inputs:
        spans = make_spans([length] * images, [1] * images)
        start, end = (span.to(make.device) for span in spans)
        return {"query": make.normal(images, hidden), "text": make.normal(rows, hidden), "start": start, "end": end}

    return Workload(
        op="text_guided_routing",
        name=name,
        sizes={"S": images, "T": rows, "H": hidden, "E": experts},
        weights=lambda make: {"router_weight": make.normal(experts, hidden, scale=hidden**-0.5)},
        data=data,
        ours=_ours,
        peers={"batched": Contender(build=_batched), "naive_loop": Contender(build=_naive_loop)},
        costs={"fwd": forward, "bwd": backward},
        leaves=LEAVES,
        terms=max(hidden, length),
        roundings=8,
        wanted={"fwd": {"ms": 1e3 * max(10e-6, 1.6 * forward.bytes / 4.3e12)}},
    )


def workloads(device: str) -> list[Workload]:
    """Texts of 128 rows at every batch size, and one batch of long texts."""
    if device == "cpu":
        return [_workload("cpu", 4, 11, 64, device)]
    found = [_workload(f"parrot_7b_b{n}_q128", n, 128, 4096, device) for n in BATCHES]
    return [
        *found,
        _workload("parrot_7b_b64_q1024", 64, 1024, 4096, device),
        _workload("parrot_14b_b4_q128", 4, 128, 5120, device),
    ]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_text_guided_routing(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
