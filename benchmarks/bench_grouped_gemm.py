"""One product for each expert over ragged rows: up- and down-projection, its gradients, and with SwiGLU.

    python -m benchmarks.bench_grouped_gemm [--device cuda] [--only qwen3] [--json FILE]
    pytest benchmarks/bench_grouped_gemm.py --benchmark-json=b.json

Rows are in the order of the groups, as every peer needs them. (Reading them through a plan is measured in
`bench_expert_mlp`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.shapes import CPU_TOKENS, PARROT, TOKENS, sized
from benchmarks.workload import Contender, Cost, Inputs, Maker, Pass, Prepared, Run, Workload, itemsize
from parrot_kernels.testing import MoEShape
from parrot_sys.ops import k_grouped_gemm, m_grouped_gemm, m_grouped_swiglu

_Rows = Callable[[Tensor, Tensor, list[int]], Run | Prepared]
GEMM: dict[str, _Rows] = {
    "cublas_loop": peers.gemm_loop,
    "grouped_mm": peers.gemm_grouped_mm,
    "deep_gemm": peers.gemm_deep_gemm,
    "triton_kernels": peers.gemm_triton_kernels,
}
WGRAD: dict[str, _Rows] = {
    "cublas_loop": peers.wgrad_loop,
    "grouped_mm": peers.wgrad_grouped_mm,
    "deep_gemm": peers.wgrad_deep_gemm,
}
WANTED: dict[Pass, dict[str, float]] = {"fwd": {"triton: best": 0.9, "cuda: best": 1.0}}


def _counts(inputs: Inputs) -> list[int]:
    """Rows of each group, on the host."""
    return (inputs["expert_offsets"].diff() * inputs["rows"].shape[1]).tolist()


def _on_rows(build: _Rows, right: str, transposed: bool) -> Callable[[Inputs], Run | Prepared]:
    """A peer on the inputs' rows and, as its second operand, `right`."""

    def prepare(inputs: Inputs) -> Run | Prepared:
        second = inputs[right].flatten(1, 2) if inputs[right].dim() == 4 else inputs[right]
        second = second.transpose(1, 2) if transposed else second
        second = second.flatten(0, 1) if right == "more_rows" else second
        return build(inputs["rows"].flatten(0, 1), second, _counts(inputs))

    return prepare


def _contenders(found: dict[str, _Rows], bound: _Rows, right: str, transposed: bool = False) -> dict[str, Contender]:
    checked = {name: Contender(build=_on_rows(build, right, transposed)) for name, build in found.items()}
    return {"cublas_bound": Contender(build=_on_rows(bound, right, transposed), checked="nothing"), **checked}


def _up(inputs: Inputs) -> Run:
    rows, w, offsets = inputs["rows"], inputs["w_gate_up"].flatten(1, 2), inputs["expert_offsets"]
    return lambda: (m_grouped_gemm(rows, w, offsets).flatten(0, 1),)


def _down(inputs: Inputs) -> Run:
    rows, w, offsets = inputs["rows"], inputs["w_down"], inputs["expert_offsets"]
    return lambda: (m_grouped_gemm(rows, w, offsets, trans_w=False).flatten(0, 1),)


def _dgrad(inputs: Inputs) -> Run:
    rows, w, offsets = inputs["rows"], inputs["w_gate_up"].flatten(1, 2), inputs["expert_offsets"]
    return lambda: (m_grouped_gemm(rows, w, offsets, trans_w=False).flatten(0, 1),)


def _wgrad(inputs: Inputs) -> Run:
    rows, more, offsets = inputs["rows"], inputs["more_rows"], inputs["expert_offsets"]
    return lambda: (k_grouped_gemm(rows, more, offsets),)


def _swiglu(inputs: Inputs) -> Run:
    rows, w, offsets = inputs["rows"], inputs["w_gate_up"], inputs["expert_offsets"]
    return lambda: (m_grouped_swiglu(rows, w, offsets).flatten(0, 1),)


def _swiglu_grouped_mm(inputs: Inputs) -> Run:
    rows, w = inputs["rows"].flatten(0, 1), inputs["w_gate_up"].flatten(1, 2).transpose(1, 2)
    ends = (inputs["expert_offsets"][1:] * inputs["rows"].shape[1]).int()

    def run() -> tuple[Tensor, ...]:
        gate, up = F.grouped_mm(rows, w, offs=ends).chunk(2, -1)
        return (F.silu(gate) * up,)

    return run


def _rows(shape: MoEShape, width: int, more: int = 0) -> Callable[[Maker], Inputs]:
    """Maker of segments of rows of a width, of others beside them if `more` is their width, and of their groups."""

    def make(maker: Maker) -> Inputs:
        segments = shape.images * shape.topk
        found = {"rows": maker.normal(segments, shape.rows, width)}
        if more:
            found["more_rows"] = maker.normal(segments, shape.rows, more)
        return found | {"expert_offsets": maker.route(shape.images, shape.experts, shape.topk)["expert_offsets"]}

    return make


def _workloads(name: str, shape: MoEShape, device: str) -> list[Workload]:
    """`shape.images` segments of `shape.rows` rows, each in `shape.topk` groups."""
    segments, hidden, ffn, groups = shape.images * shape.topk, shape.hidden, shape.ffn, shape.experts
    used, rows, size = min(groups, segments), segments * shape.rows, itemsize(device)
    sizes = {"J": segments, "V": shape.rows, "H": hidden, "I": ffn, "G": groups}

    data = partial(_rows, shape)

    def w_gate_up(make: Maker) -> Inputs:
        return {"w_gate_up": make.normal(groups, 2, ffn, hidden, scale=hidden**-0.5)}

    def w_down(make: Maker) -> Inputs:
        return {"w_down": make.normal(groups, ffn, hidden, scale=ffn**-0.5)}

    def cost(depth: int, width: int, *, written: int | None = None, weights: int | None = None) -> Cost:
        numbers = rows * (depth + (width if written is None else written))
        numbers += used * depth * width if weights is None else weights
        return Cost(flops=2 * rows * depth * width, bytes=size * numbers)

    def workload(kind: str, **rest: Any) -> Workload:
        terms = max(2 * ffn, hidden, rows if kind == "wgrad" else 0)
        return Workload(op="grouped_gemm", name=f"{name}_{kind}", sizes=sizes, terms=terms, **rest)

    def product(kind: str, weights: Any, data: Any, ours: Any, peers: Any, forward: Cost) -> Workload:
        costs: dict[Pass, Cost] = {"fwd": forward}
        return workload(kind, weights=weights, data=data, ours=ours, peers=peers, costs=costs, wanted=WANTED)

    up = cost(hidden, 2 * ffn)
    swiglu = Cost(flops=up.flops, bytes=size * (rows * (hidden + 3 * ffn) + 2 * used * hidden * ffn))
    swiglu_bwd_numbers = rows * (2 * hidden + 3 * ffn) + 4 * used * hidden * ffn
    linear, plain = (_contenders(GEMM, peers.gemm_bound, "w_gate_up", transposed) for transposed in (True, False))
    down = _contenders(GEMM, peers.gemm_bound, "w_down")
    wgrad = _contenders(WGRAD, peers.wgrad_bound, "more_rows")
    wgrad_cost = Cost(flops=up.flops, bytes=size * (rows * (hidden + 2 * ffn) + 2 * groups * hidden * ffn))
    return [
        product("up", w_gate_up, data(hidden), _up, linear, up),
        product("down", w_down, data(ffn), _down, down, cost(ffn, hidden)),
        product("dgrad", w_gate_up, data(2 * ffn), _dgrad, plain, cost(2 * ffn, hidden)),
        product("wgrad", lambda make: {}, data(2 * ffn, hidden), _wgrad, wgrad, wgrad_cost),
        workload(
            "swiglu",
            weights=w_gate_up,
            data=data(hidden),
            ours=_swiglu,
            peers={"grouped_mm": Contender(build=_swiglu_grouped_mm)},
            costs={"fwd": swiglu, "bwd": Cost(flops=2 * up.flops, bytes=size * swiglu_bwd_numbers)},
            leaves=("rows", "w_gate_up"),
        ),
    ]


def workloads(device: str) -> list[Workload]:
    """Image segments of Parrot's top-2 and top-1 routing, and permuted tokens."""
    if device == "cpu":
        shapes = {"cpu_images": MoEShape(images=6, rows=7, hidden=64, experts=4, ffn=48, topk=2)}
    else:
        seven, fourteen = PARROT.values()
        shapes = {f"parrot_7b_b{n}_top2": sized(seven, images=n, topk=2) for n in (4, 16, 64, 1)}
        shapes["parrot_7b_b4_top1"] = sized(seven, images=4, topk=1)
        shapes["parrot_14b_b4_top2"] = sized(fourteen, images=4, topk=2)
    for name, tokens in (CPU_TOKENS if device == "cpu" else TOKENS).items():
        sizes = {"hidden": tokens.hidden, "experts": tokens.experts, "ffn": tokens.ffn, "topk": tokens.topk}
        shapes[name] = MoEShape(images=tokens.tokens, rows=1, **sizes)
    return [workload for name, shape in shapes.items() for workload in _workloads(name, shape, device)]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_grouped_gemm(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
