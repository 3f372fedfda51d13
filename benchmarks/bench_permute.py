"""`permute` and `unpermute` of token rows with their probabilities, against PyTorch's indexing.

python -m benchmarks.bench_permute [--device cuda] [--json FILE]
pytest benchmarks/bench_permute.py --benchmark-json=b.json
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import CPU_TOKENS, TOKENS, TokenShape
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_sys.ops import permute, unpermute

NAMES = ("qwen3_30b_a3b", "deepseek_v3_ep8", "d4096_n2048_e64_k4")
WANTED: dict[Pass, dict[str, float]] = {"fwd": {"share": 0.85}, "bwd": {"share": 0.85}}


def _topk(inputs: Inputs) -> int:
    return inputs["probs"].shape[1]


def _permute(inputs: Inputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        rows, probs = permute(inputs["x"], inputs["plan"], topk=_topk(inputs), probs=inputs["probs"])
        assert probs is not None, "probabilities were given"
        return rows, probs

    return run


def _torch_permute(inputs: Inputs) -> Run:
    x, plan, probs = inputs["x"], inputs["plan"], inputs["probs"]
    return lambda: (x.index_select(0, plan // _topk(inputs)), probs.flatten().index_select(0, plan))


def _unpermute(inputs: Inputs) -> Run:
    rows, plan, probs = inputs["x"], inputs["plan"], inputs["probs"]
    return lambda: (unpermute(rows, plan, topk=_topk(inputs), num_rows=len(probs), probs=probs),)


def _torch_unpermute(inputs: Inputs) -> Run:
    rows, plan, probs = inputs["x"], inputs["plan"], inputs["probs"]

    def run() -> tuple[Tensor, ...]:
        weighted = rows * probs.flatten()[plan, None].to(rows.dtype)
        return (rows.new_zeros(len(probs), rows.shape[1]).index_add(0, plan // _topk(inputs), weighted),)

    return run


def _workloads(name: str, shape: TokenShape, device: str) -> list[Workload]:
    tokens, topk, hidden = shape.tokens, shape.topk, shape.hidden
    routed = tokens * topk

    def data(rows: int) -> Any:
        def make(maker: Maker) -> Inputs:
            route = maker.route(tokens, shape.experts, topk)
            probs = route["probs"].gather(1, route["topk_indices"])
            return {"x": maker.normal(rows, hidden), "probs": probs, "plan": route["plan"]}

        return make

    moved = itemsize(device) * hidden * (tokens + routed) + 16 * routed  # rows; plan and probabilities
    # The gradient of the probabilities needs the rows again.
    unpermute_bwd = itemsize(device) * hidden * (tokens + 2 * routed) + 16 * routed
    sizes = {"T": tokens, "K": topk, "W": hidden}
    common: dict[str, Any] = {"sizes": sizes, "weights": lambda make: {}, "leaves": ("x", "probs"), "wanted": WANTED}
    return [
        Workload(
            op="permute",
            name=f"{name}_permute",
            data=data(tokens),
            ours=_permute,
            peers={"torch": Contender(build=_torch_permute)},
            costs={"fwd": Cost(flops=0, bytes=moved), "bwd": Cost(flops=routed * hidden, bytes=moved)},
            terms=topk,
            **common,
        ),
        Workload(
            op="permute",
            name=f"{name}_unpermute",
            data=data(routed),
            ours=_unpermute,
            peers={"torch": Contender(build=_torch_unpermute)},
            costs={
                "fwd": Cost(flops=2 * routed * hidden, bytes=moved),
                "bwd": Cost(flops=3 * routed * hidden, bytes=unpermute_bwd),
            },
            terms=hidden,
            **common,
        ),
    ]


def workloads(device: str) -> list[Workload]:
    """Both directions, for tokens of public language models."""
    shapes = CPU_TOKENS if device == "cpu" else {name: TOKENS[name] for name in NAMES}
    return [workload for name, shape in shapes.items() for workload in _workloads(name, shape, device)]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_permute(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
