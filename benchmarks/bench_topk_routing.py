"""`topk_routing` of images and tokens: scores, best experts, counts, offsets and dispatch plan.

python -m benchmarks.bench_topk_routing [--device cuda] [--json FILE]
pytest benchmarks/bench_topk_routing.py --benchmark-json=b.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import BATCHES, CPU_TOKENS, TOKEN_ROUTING, TokenShape
from benchmarks.workload import Contender, Cost, Inputs, Pass, Run, Workload
from parrot_sys.ops import topk_routing

LAUNCH_SECONDS = 2e-6
FLOATS = ("probs", "scores", "lse", "score_sums", "z_sum")
DEEPSEEK_V3 = {"score_function": "sigmoid", "scaling_factor": 2.5, "num_groups": 8, "topk_groups": 4}


def _ours(topk: int, options: dict[str, Any]) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        more = {**options, "expert_bias": inputs["bias"]} if options else {}

        def run() -> tuple[Tensor, ...]:
            route = topk_routing(inputs["logits"], topk, renormalize=True, **more)
            return tuple(getattr(route, name) for name in FLOATS)

        return run

    return build


def _allowed(ranked: Tensor, topk: int, options: dict[str, Any]) -> Tensor:
    """`ranked` with the experts of all but the best groups at -inf."""
    by_group = ranked.unflatten(1, (options["num_groups"], -1))
    best = by_group.topk(topk // options["topk_groups"], 2).values.sum(2).topk(options["topk_groups"]).indices
    forbidden = torch.ones(by_group.shape[:2], dtype=torch.bool, device=ranked.device).scatter(1, best, False)
    return by_group.masked_fill(forbidden[:, :, None], -torch.inf).flatten(1)


def _torch(topk: int, options: dict[str, Any]) -> Callable[[Inputs], Run]:
    """The same outputs, plan and counts included, from PyTorch's operators."""

    def build(inputs: Inputs) -> Run:
        def run() -> tuple[Tensor, ...]:
            logits = inputs["logits"]
            lse = logits.logsumexp(-1)
            scores = logits.sigmoid() if options else logits.softmax(-1)
            ranked = _allowed(scores.detach() + inputs["bias"], topk, options) if options else scores.detach()
            indices = ranked.topk(topk).indices
            values = scores.gather(1, indices)
            values = values / values.sum(-1, keepdim=True) * options.get("scaling_factor", 1.0)
            probs = torch.zeros_like(scores).scatter(1, indices, values)
            shares = scores / scores.sum(-1, keepdim=True) if options else scores
            flat = indices.flatten()
            counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=flat.device)
            counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0)
            flat.argsort(stable=True)
            return probs, scores, lse, shares.sum(0), lse.square().sum()

        return run

    return build


def _workload(name: str, rows: int, experts: int, topk: int, options: dict[str, Any]) -> Workload:
    numbers = rows * experts
    forward = Cost(flops=5 * numbers, bytes=4 * (3 * numbers + rows) + 16 * rows * topk)
    backward = Cost(flops=6 * numbers, bytes=4 * 4 * numbers)
    byte_seconds, launches = forward.bytes / 4.3e12, 1 if rows <= 64 else 3
    return Workload(
        op="topk_routing",
        name=name,
        sizes={"n": rows, "E": experts, "K": topk},
        weights=lambda make: {"bias": make.normal(experts, scale=0.1, dtype=torch.float32)},
        data=lambda make: {"logits": make.normal(rows, experts, dtype=torch.float32)},
        ours=_ours(topk, options),
        peers={"torch": Contender(build=_torch(topk, options))},
        costs={"fwd": forward, "bwd": backward},
        leaves=("logits",),
        terms=max(experts, rows),
        wanted={"fwd": {"ms": 1e3 * (3 * byte_seconds + launches * LAUNCH_SECONDS)}},
    )


def workloads(device: str) -> list[Workload]:
    """Tokens of public language models, then a micro-batch of Parrot's images."""
    tokens: dict[str, TokenShape] = CPU_TOKENS if device == "cpu" else TOKEN_ROUTING
    found = [
        _workload(name, shape.tokens, shape.experts, shape.topk, DEEPSEEK_V3 if name == "deepseek_v3" else {})
        for name, shape in tokens.items()
    ]
    if device == "cpu":
        found.append(_workload("cpu_deepseek_v3", 40, 64, 8, DEEPSEEK_V3))
    batches = (8,) if device == "cpu" else BATCHES
    return found + [_workload(f"parrot_b{n}", n, 6, 2, {}) for n in batches]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_topk_routing(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
