"""TextGuidedMoE, forward and backward, against a loop over samples and experts.

    python -m benchmarks.bench_text_guided_moe --json benchmarks/results/cpu/text_guided_moe.json
    pytest benchmarks/bench_text_guided_moe.py --benchmark-json=b.json

Each ratio comes from runs taken in turns; results and gradients are compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import interleaved_times, parse_arguments, ratio, report, saved_bytes
from benchmarks.released_loop import ReleasedLoop
from benchmarks.shapes import CPU_DENSE, CPU_MANY_SMALL, TEXT_ROWS
from parrot_kernels.testing import MoEShape, make_spans
from parrot_sys.modules.released_experts import experts_to_released
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoE

Routing = Literal["dense", "topk"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    shape: MoEShape
    routing: Routing
    baseline_routing: Routing
    wanted_ratio: float
    wanted_saved: float | None = None
    """Upper bound of our saved activations over the baseline's."""


CASES = (
    Case(name="dense", shape=CPU_DENSE, routing="dense", baseline_routing="dense", wanted_ratio=1.0, wanted_saved=0.45),
    Case(name="top2_vs_dense_loop", shape=CPU_DENSE, routing="topk", baseline_routing="dense", wanted_ratio=2.5),
    Case(name="top2_vs_top2_loop", shape=CPU_DENSE, routing="topk", baseline_routing="topk", wanted_ratio=1.0),
    Case(name="many_small", shape=CPU_MANY_SMALL, routing="dense", baseline_routing="dense", wanted_ratio=3.0),
)


class Setup:
    """Both modules with the same weights, on the same inputs."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        shape = case.shape
        config = TextGuidedMoEConfig(
            num_experts=shape.experts, ffn_hidden_size=shape.ffn, routing=case.routing, topk=shape.topk
        )
        self.ours = TextGuidedMoE(config, shape.hidden)
        state = self.ours.state_dict()
        self.loop = ReleasedLoop(replace(config, routing=case.baseline_routing), state)
        self._same_rule = ReleasedLoop(config, state)
        self.features = torch.randn(shape.images, shape.rows, shape.hidden, requires_grad=True)
        self.text = torch.randn(shape.images * TEXT_ROWS, shape.hidden, requires_grad=True)
        self.spans = make_spans([TEXT_ROWS] * shape.images, [1] * shape.images)
        self.grad = torch.randn(self.features.shape)

    def forward(self, module: nn.Module) -> Tensor:
        """The module's output features."""
        output = module(self.features, self.text, *self.spans)
        return output[0] if isinstance(output, tuple) else output

    def step(self, module: nn.Module) -> Callable[[], None]:
        """Forward and backward pass with gradients of inputs and parameters, which are allocated anew each time."""

        def run() -> None:
            for tensor in (self.features, self.text, *module.parameters()):
                tensor.grad = None
            self.forward(module).backward(self.grad)

        return run

    def saved(self, module: nn.Module) -> int:
        """Bytes kept for the backward pass."""
        return saved_bytes(lambda: self.forward(module), [self.features, self.text, *module.parameters()])

    def check_equal(self) -> None:
        """Same output and gradients as the loop under the same routing rule, to 1e-4 of the largest value."""
        results = []
        for module in (self.ours, self._same_rule):
            self.step(module)()
            output = self.forward(module).detach()
            results.append({"output": output, "features": self.features.grad, "text": self.text.grad})
        grads = experts_to_released({name: p.grad for name, p in self.ours.named_parameters()})
        for e, expert in enumerate(self._same_rule.experts):
            for part, weight in expert.items():
                results[0][f"{e}.{part}"] = grads[f"experts.{e}.{part}_proj.weight"]
                # The loop never touches an expert that nobody chose.
                results[1][f"{e}.{part}"] = torch.zeros_like(weight) if weight.grad is None else weight.grad
        results[0]["router"], results[1]["router"] = grads["gate.weight"], self._same_rule.router.grad
        for name, wanted in results[1].items():
            error = (results[0][name] - wanted).abs().max()
            assert error <= 1e-4 * wanted.abs().max(), f"{name}: error {float(error):.1e} against the loop"
        self._same_rule.zero_grad()


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    setup = Setup(case)
    setup.check_equal()
    saved_ours, saved_loop = setup.saved(setup.ours), setup.saved(setup.loop)
    times = interleaved_times({"loop": setup.step(setup.loop), "ours": setup.step(setup.ours)}, repeats)
    shape = case.shape
    return {
        "case": case.name,
        "shape": f"B{shape.images} V{shape.rows} H{shape.hidden} I{shape.ffn} E{shape.experts} K{shape.topk}",
        "loop_ms": 1e3 * statistics.median(times["loop"]),
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "ratio": ratio(times, "loop", "ours"),
        "wanted_ratio": case.wanted_ratio,
        "saved_loop_mb": saved_loop / 1e6,
        "saved_ours_mb": saved_ours / 1e6,
        "saved_ratio": saved_ours / saved_loop,
        "wanted_saved_ratio": case.wanted_saved,
    }


@pytest.mark.parametrize("side", ["loop", "ours"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_text_guided_moe(benchmark: Any, case: Case, side: str) -> None:
    setup = Setup(case)
    module = setup.ours if side == "ours" else setup.loop
    benchmark.extra_info["saved_mb"] = setup.saved(module) / 1e6
    benchmark.pedantic(setup.step(module), rounds=3, warmup_rounds=1)


def main() -> None:
    """Print the table and, with --json, write it."""
    arguments = parse_arguments(__doc__, repeats=9)
    report("text_guided_moe", [measure(case, arguments.repeats) for case in CASES], arguments.json)


if __name__ == "__main__":
    main()
