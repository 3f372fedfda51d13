"""The whole `TextGuidedMoE` layer, router included, against the released code's loop over samples and experts.

    python -m benchmarks.bench_moe_layer [--device cuda] [--only b4] [--json FILE]
    pytest benchmarks/bench_moe_layer.py --benchmark-json=b.json

(`bench_text_guided_moe` holds the CPU shapes that the project's targets name, with saved activations.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks.bench_expert_mlp import costs
from benchmarks.measure import main, pytest_cases, run_under_pytest
from benchmarks.released_loop import ReleasedLoop
from benchmarks.shapes import TEXT_ROWS, images
from benchmarks.workload import Contender, Grads, Inputs, Maker, Pass, Prepared, Workload, itemsize
from parrot_kernels.testing import MoEShape, make_spans
from parrot_sys.modules.released_experts import experts_from_released
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoE

WEIGHTS = ("router_weight", "w_gate_up", "w_down")
LEAVES = ("features", "text", *WEIGHTS)


def _config(shape: MoEShape) -> TextGuidedMoEConfig:
    return TextGuidedMoEConfig(num_experts=shape.experts, ffn_hidden_size=shape.ffn, routing="dense")


def _ours(shape: MoEShape) -> Callable[[Inputs], Prepared]:
    def build(inputs: Inputs) -> Prepared:
        module = TextGuidedMoE(_config(shape), shape.hidden, device="meta")
        for name in WEIGHTS:
            setattr(module, name, nn.Parameter(inputs[name].detach()))
        features, text, start, end = (inputs[name] for name in ("features", "text", "start", "end"))
        leaves = [features, text, *(getattr(module, name) for name in WEIGHTS)]
        return Prepared(run=lambda: (module(features, text, start, end)[0],), leaves=leaves)

    return build


def _loop(shape: MoEShape) -> Callable[[Inputs], Prepared]:
    def build(inputs: Inputs) -> Prepared:
        module = ReleasedLoop(_config(shape), {name: inputs[name].detach() for name in WEIGHTS})
        parameters = dict(module.named_parameters())
        features, text, start, end = (inputs[name] for name in ("features", "text", "start", "end"))

        def merge(grads: Grads) -> Grads:
            released = {}
            for name, grad in zip(parameters, grads[2:], strict=True):
                assert grad is not None, f"the dense loop uses {name}"
                path = name.split(".")
                key = "gate.weight" if name == "router" else f"experts.{path[1]}.{path[2]}_proj.weight"
                released[key] = grad
            fused = experts_from_released(released)
            return [*grads[:2], *(fused[name] for name in WEIGHTS)]

        leaves = [features, text, *parameters.values()]
        return Prepared(run=lambda: (module(features, text, start, end),), leaves=leaves, merge=merge)

    return build


def _workload(name: str, shape: MoEShape, device: str) -> Workload:
    n, rows, hidden, experts = shape.images, shape.images * shape.rows, shape.hidden, shape.experts

    def weights(make: Maker) -> dict[str, Tensor]:
        return {
            "router_weight": make.normal(experts, hidden, scale=hidden**-0.5),
            "w_gate_up": make.normal(experts, 2, shape.ffn, hidden, scale=hidden**-0.5),
            "w_down": make.normal(experts, shape.ffn, hidden, scale=shape.ffn**-0.5),
        }

    def data(make: Maker) -> Inputs:
        start, end = (span.to(make.device) for span in make_spans([TEXT_ROWS] * n, [1] * n))
        tensors = {"features": make.normal(n, shape.rows, hidden), "text": make.normal(n * TEXT_ROWS, hidden)}
        return tensors | {"start": start, "end": end}

    target: dict[Pass, dict[str, float]] = {"fwd_bwd": {"ms": 7.5, "x released_loop": 1.7}}
    passes = costs(rows, rows * experts, experts, hidden, shape.ffn, itemsize(device))
    return Workload(
        op="moe_layer",
        name=f"{name}_dense",
        sizes={"n": n, "V": shape.rows, "H": hidden, "E": experts, "I": shape.ffn},
        weights=weights,
        data=data,
        ours=_ours(shape),
        peers={"released_loop": Contender(build=_loop(shape))},
        costs={"fwd_bwd": passes["fwd"] + passes["bwd"]},
        leaves=LEAVES,
        terms=max(experts * shape.ffn, rows, 2 * hidden),
        roundings=12,
        backends=("auto",),
        wanted=target if name == "parrot_7b_b4" else {},
    )


def workloads(device: str) -> list[Workload]:
    """The dense form at every batch size.

    (Top-k would not compare in bfloat16: the loop rounds the logits, and near ties then go to another expert.)
    """
    return [_workload(name, shape, device) for name, shape in images(device)]


@pytest.mark.parametrize(("workload", "contender", "which"), pytest_cases(workloads("cpu")))
def bench_moe_layer(benchmark: Any, workload: Workload, contender: str, which: Pass) -> None:
    run_under_pytest(benchmark, workload, contender, which)


if __name__ == "__main__":
    main(__doc__, workloads)
