"""Host time of a TextGuidedMoE layer, forward and backward: what Python, PyTorch and Triton take to enqueue it.

    python -m benchmarks.bench_host_time --json benchmarks/results/cpu/host_time.json

Needs no GPU: a driver that launches nothing stands in for CUDA's, under real launchers and real autograd. The tensors
are small and on the CPU, since only their number matters. Left out is what CUDA itself takes for a launch. A layer is
one of a chain, so that entering the backward pass counts once for all of them; times are of this thread's processor,
so that other programs disturb little, and PyTorch has this thread alone: a GPU's softmax does not wait for another one.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from triton.runtime.driver import driver

from benchmarks.harness import parse_arguments, report
from parrot_kernels import triton_support
from parrot_kernels.compile_only import CompileOnlyDriver
from parrot_kernels.testing import make_spans
from parrot_sys.modules.text_guided_moe import TextGuidedMoE, TextGuidedMoEConfig
from parrot_sys.ops import force_backend

LAYERS, IMAGES, ROWS, HIDDEN, TEXT = 8, 2, 64, 64, 16
WANTED_MS = 0.35
LOSS = {"aux_loss_coeff": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"routing": "dense"},
    "top2": {"routing": "topk"},
    "dense, three ops": {"routing": "dense", **LOSS},
    "top2, three ops": {"routing": "topk", **LOSS},
}


def stand_in() -> None:
    """From now on Triton's kernels take CPU tensors and are not launched."""
    driver.set_active(CompileOnlyDriver(90))
    triton_support.DEVICE = "cpu"


class Chain:
    """Layers one after the other, and a step through them."""

    def __init__(self, options: dict[str, Any]) -> None:
        config = TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=32, **options)
        self.layers = nn.ModuleList(TextGuidedMoE(config, HIDDEN, dtype=torch.bfloat16) for _ in range(LAYERS))
        self.features = torch.randn(IMAGES, ROWS, HIDDEN).bfloat16().requires_grad_()
        # Of each layer its own, so that no time goes into adding their gradients.
        self.texts = [torch.randn(IMAGES * TEXT, HIDDEN).bfloat16().requires_grad_() for _ in range(LAYERS)]
        self.spans = make_spans([TEXT] * IMAGES, [1] * IMAGES)
        self.grad = torch.randn(self.features.shape).bfloat16()

    def forward(self) -> Tensor:
        """Through all layers; auxiliary losses are left out of the graph."""
        features = self.features
        for layer, text in zip(self.layers, self.texts, strict=True):
            features, _ = layer(features, text, *self.spans)
        return features

    def step(self) -> tuple[float, float]:
        """Milliseconds a layer, forward and backward."""
        for tensor in (self.features, *self.texts, *self.layers.parameters()):
            tensor.grad = None
        start = time.thread_time()
        output = self.forward()
        middle = time.thread_time()
        output.backward(self.grad)
        end = time.thread_time()
        return 1e3 * (middle - start) / LAYERS, 1e3 * (end - middle) / LAYERS


def measure(case: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    chain = Chain(CASES[case])
    for _ in range(2):  # compile
        chain.step()
    times = [chain.step() for _ in range(repeats)]
    both = sorted(sum(pair) for pair in times)
    forward, backward = (statistics.median(part) for part in zip(*times, strict=True))
    return {
        "case": case,
        "forward_ms": forward,
        "backward_ms": backward,
        "median_ms": statistics.median(both),
        "p10_ms": both[len(both) // 10],
        "min_ms": both[0],
        "wanted_ms": WANTED_MS if "three ops" not in case else None,
    }


def main() -> None:
    """Print the table and, with --json, write it."""
    arguments = parse_arguments(__doc__, repeats=200)
    torch.set_num_threads(1)
    stand_in()
    with force_backend("triton"):
        report("host_time", [measure(case, arguments.repeats) for case in CASES], arguments.json)


if __name__ == "__main__":
    main()
