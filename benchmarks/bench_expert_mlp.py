"""Experts over images (dense, top-1, top-2) and over tokens, against loops and libraries.

python -m benchmarks.bench_expert_mlp [--device cuda] [--only parrot_7b_b4] [--json FILE]
pytest benchmarks/bench_expert_mlp.py --benchmark-json=b.json
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import CPU_TOKENS, TOKENS, TokenShape, images, sized
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Run, Workload, itemsize
from parrot_kernels.testing import MoEShape
from parrot_sys.ops import TopKRouting, expert_mlp, m_grouped_gemm, m_grouped_swiglu, unpermute

LEAVES = ("x", "w_gate_up", "w_down", "probs")
RESIDUAL = 0.1  # the released code's; tokens have none


def _weights(make: Maker, hidden: int, experts: int, ffn: int) -> Inputs:
    return {
        "w_gate_up": make.normal(experts, 2, ffn, hidden, scale=hidden**-0.5),
        "w_down": make.normal(experts, ffn, hidden, scale=ffn**-0.5),
    }


def costs(rows: int, routed: int, experts: int, hidden: int, ffn: int, size: int) -> dict[Pass, Cost]:
    """Least work when `routed` (row, expert) pairs of `rows` rows use the weights of `experts` experts."""
    flops, weights = 6 * routed * hidden * ffn, 3 * experts * hidden * ffn
    forward = 2 * rows * hidden + weights + 2 * routed * ffn  # x, weights; y, z
    backward = 3 * rows * hidden + 2 * weights + 2 * routed * ffn  # dy, x, weights, z; dx and the weights' gradients
    return {"fwd": Cost(flops=flops, bytes=size * forward), "bwd": Cost(flops=2 * flops, bytes=size * backward)}


def ours(inputs: Inputs, *, fp8: bool = False) -> Run:
    """`expert_mlp` on the inputs of a workload."""
    route = TopKRouting(**{name: inputs[name] for name in TopKRouting._fields}) if "plan" in inputs else None
    tensors = [inputs[name] for name in LEAVES]
    return lambda: (expert_mlp(*tensors, plan=route, residual_scale=RESIDUAL, fp8=fp8),)


def image_workload(name: str, shape: MoEShape, device: str) -> Workload:
    """Experts over images in one form; dense where every expert is chosen."""
    n, rows, experts = shape.images, shape.images * shape.rows, shape.experts
    dense = shape.topk == experts

    def data(make: Maker) -> Inputs:
        x = {"x": make.normal(n, shape.rows, shape.hidden)}
        return x | ({"probs": make.probabilities(n, experts)} if dense else make.route(n, experts, shape.topk))

    used = min(experts, n * shape.topk)
    loop, bound = (peers.dense_loop, peers.dense_bound) if dense else (peers.topk_loop, peers.topk_bound)
    found = {
        "cublas_bound": Contender(build=bound, checked="nothing"),
        "cublas_loop": Contender(build=functools.partial(loop, residual=RESIDUAL)),
        "naive_loop": Contender(build=functools.partial(peers.naive_loop, residual=RESIDUAL)),
    }
    if not dense:
        found["grouped_mm"] = Contender(build=functools.partial(peers.grouped_mm_experts, residual=RESIDUAL))
    wanted: dict[Pass, dict[str, float]] = {}
    if dense and n >= 4:
        wanted = {which: {"tflops": 620, "x cublas_bound": 0.9} for which in ("fwd", "bwd")}
    return Workload(
        op="expert_mlp",
        name=f"{name}_{'dense' if dense else f'top{shape.topk}'}",
        sizes={"n": n, "V": shape.rows, "H": shape.hidden, "E": experts, "I": shape.ffn, "K": shape.topk},
        weights=lambda make: _weights(make, shape.hidden, experts, shape.ffn),
        data=data,
        ours=ours,
        peers=found,
        costs=costs(rows, rows * shape.topk, used, shape.hidden, shape.ffn, itemsize(device)),
        leaves=LEAVES,
        terms=max(experts * shape.ffn, rows, 2 * shape.hidden),
        wanted=wanted,
    )


def _token_layer(inputs: Inputs) -> Run:
    """Token routing out of the grouped ops: gather on load, weight in the SwiGLU epilogue, sum of K rows a token."""
    x, w_gate_up, w_down, probs = (inputs[name].squeeze(1) for name in LEAVES)
    indices, offsets, plan = (inputs[name] for name in ("topk_indices", "expert_offsets", "plan"))
    topk = indices.shape[1]

    def run() -> tuple[Tensor, ...]:
        weights = probs.gather(1, indices).flatten()[plan]
        h = m_grouped_swiglu(x, w_gate_up, offsets, weights=weights, plan=plan, topk=topk)
        rows = m_grouped_gemm(h, w_down, offsets, trans_w=False)
        return (unpermute(rows, plan, topk=topk, num_rows=len(x)).unsqueeze(1),)

    return run


def _token_workload(name: str, shape: TokenShape, device: str) -> Workload:
    routed = shape.tokens * shape.topk

    def data(make: Maker) -> Inputs:
        x = {"x": make.normal(shape.tokens, 1, shape.hidden)}
        return x | make.route(shape.tokens, shape.experts, shape.topk)

    return Workload(
        op="token_experts",
        name=name,
        sizes={"T": shape.tokens, "H": shape.hidden, "E": shape.experts, "I": shape.ffn, "K": shape.topk},
        weights=lambda make: _weights(make, shape.hidden, shape.experts, shape.ffn),
        data=data,
        ours=_token_layer,
        peers={
            "cublas_bound": Contender(build=peers.topk_bound, checked="nothing"),
            "cublas_loop": Contender(build=functools.partial(peers.topk_loop, residual=0.0)),
            "grouped_mm": Contender(build=functools.partial(peers.grouped_mm_experts, residual=0.0)),
            "liger": Contender(build=peers.liger_moe),
        },
        costs=costs(shape.tokens, routed, shape.experts, shape.hidden, shape.ffn, itemsize(device)),
        leaves=LEAVES,
        terms=max(shape.topk * shape.ffn, 4 * routed // shape.experts, 2 * shape.hidden),
        backends=("auto",),
    )


def workloads(device: str) -> list[Workload]:
    """Image routing at every batch size in three forms, then token routing."""
    found = [
        image_workload(name, sized(shape, topk=topk), device)
        for name, shape in images(device)
        for topk in (shape.experts, 2, 1)
    ]
    tokens = CPU_TOKENS if device == "cpu" else TOKENS
    return found + [_token_workload(name, shape, device) for name, shape in tokens.items()]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_expert_mlp(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
