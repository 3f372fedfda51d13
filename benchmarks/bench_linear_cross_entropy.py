"""Loss over label rows only, without full logits, against the full-logits loss of the released code.

    python -m benchmarks.bench_linear_cross_entropy --json benchmarks/results/cpu/linear_cross_entropy.json
    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-json=b.json

One step is LM head, cross entropy and backward pass to hidden states and head. `full` forms float32 logits of all
T rows and ignores the rows without a label; `label_rows` takes the L label rows through `linear_cross_entropy`. Peak
memory is the high-water mark of a process of its own, less what it held before the step; times are taken in turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ROOT, interleaved_times, parse_arguments, ratio, report
from benchmarks.peers import library
from benchmarks.shapes import CPU_HEADS, HEADS, HeadShape
from benchmarks.workload import Contender, Cost, Inputs, Run, Workload, itemsize
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.ops import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Case:
    """T rows of which L bear a label, hidden size, vocabulary."""

    name: str
    rows: int
    labels: int
    hidden: int
    vocabulary: int
    freeze_head: bool = False


CASES = (
    # One sample: 577 visual rows, a prompt and an answer, with Qwen's vocabulary.
    Case(name="qwen_vocabulary", rows=1024, labels=256, hidden=256, vocabulary=151_936),
    Case(name="qwen_vocabulary_frozen", rows=1024, labels=256, hidden=256, vocabulary=151_936, freeze_head=True),
    # Every row bears a label: what not forming the logits costs and saves by itself.
    Case(name="all_rows", rows=1024, labels=1024, hidden=512, vocabulary=32_000),
)
VARIANTS = ("full", "label_rows")


def make_step(case: Case, variant: str) -> Callable[[], Tensor]:
    """A step that returns the sum of the losses."""
    torch.manual_seed(0)
    hidden = torch.randn(case.rows, case.hidden, requires_grad=True)
    weight = (torch.randn(case.vocabulary, case.hidden) * case.hidden**-0.5).requires_grad_(not case.freeze_head)
    label_rows = torch.randperm(case.rows)[: case.labels].sort().values
    targets = torch.randint(case.vocabulary, (case.labels,))
    labels = torch.full((case.rows,), IGNORE_ID).index_put((label_rows,), targets)

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        if variant == "full":
            loss = F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE_ID, reduction="sum")
        else:
            loss = linear_cross_entropy(hidden.index_select(0, label_rows), weight, targets).sum()
        loss.backward()
        return loss.detach()

    step.tensors = hidden, weight  # type: ignore[attr-defined]
    return step


def check_equal(case: Case) -> None:
    """Both variants give the same loss and gradients, to 1e-4."""
    results = []
    for variant in VARIANTS:
        step = make_step(case, variant)
        loss = step()
        results.append([loss, *(tensor.grad for tensor in step.tensors if tensor.requires_grad)])  # type: ignore[attr-defined]
    for full, own in zip(*results, strict=True):
        assert (own - full).abs().max() <= 1e-4 * full.abs().max(), case.name


def peak_megabytes(case: Case, variant: str, threads: int) -> float:
    """Growth of a fresh process's high-water mark by one step."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_linear_cross_entropy",
        "--peak-of",
        case.name,
        variant,
        str(threads),
    ]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output))


def _print_peak(name: str, variant: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    case = next(case for case in CASES if case.name == name)
    # Loads what a first call loads, so that it does not count.
    make_step(Case(name="warm_up", rows=8, labels=4, hidden=8, vocabulary=16), variant)()
    step = make_step(case, variant)
    before = _status_kilobytes("VmRSS")
    step()
    print((_status_kilobytes("VmHWM") - before) / 1024)


def _status_kilobytes(field: str) -> int:
    """Not from getrusage: its ru_maxrss starts at that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measure(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    check_equal(case)
    times = interleaved_times({variant: make_step(case, variant) for variant in VARIANTS}, repeats)
    peaks = {variant: peak_megabytes(case, variant, threads) for variant in VARIANTS}
    return {
        "case": case.name,
        "shape": f"T{case.rows} L{case.labels} H{case.hidden} vocabulary {case.vocabulary}",
        "full_ms": 1e3 * statistics.median(times["full"]),
        "label_rows_ms": 1e3 * statistics.median(times["label_rows"]),
        "ratio": ratio(times, "full", "label_rows"),
        "full_peak_mb": peaks["full"],
        "label_rows_peak_mb": peaks["label_rows"],
        "peak_ratio": peaks["label_rows"] / peaks["full"],
    }


def _ours(inputs: Inputs) -> Run:
    return lambda: (linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["targets"]).sum(),)


def _full(inputs: Inputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        logits = inputs["hidden"] @ inputs["weight"].T
        return (F.cross_entropy(logits.float(), inputs["targets"], reduction="sum"),)

    return run


def _liger(inputs: Inputs) -> Run:
    """Liger's forms the gradients in its forward pass, for a loss whose own gradient is one."""
    function = library("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    tensors = [inputs[name] for name in ("hidden", "weight", "targets")]
    return lambda: (function.apply(*tensors, None, None, IGNORE_ID, 0.0, 0.0, "sum")[0],)


def _cut(inputs: Inputs) -> Run:
    """Apple's cut cross entropy, without its filter, which drops small gradients."""
    function = library("cut_cross_entropy").linear_cross_entropy
    tensors = [inputs[name] for name in ("hidden", "weight", "targets")]
    return lambda: (function(*tensors, reduction="sum", filter_eps=None),)


def _workload(name: str, shape: HeadShape, device: str) -> Workload:
    labels, hidden, vocabulary = shape.labels, shape.hidden, shape.vocabulary
    numbers = 2 * (labels * hidden + vocabulary * hidden)
    return Workload(
        op="linear_cross_entropy",
        name=name,
        sizes={"L": labels, "H": hidden, "N": vocabulary},
        weights=lambda make: {"weight": make.normal(vocabulary, hidden, scale=hidden**-0.5)},
        data=lambda make: {"hidden": make.normal(labels, hidden), "targets": make.integers(vocabulary, labels)},
        ours=_ours,
        peers={
            "full_logits": Contender(build=_full),
            "liger": Contender(build=_liger),
            "cut_cross_entropy": Contender(build=_cut),
        },
        costs={"fwd_bwd": Cost(flops=6 * labels * hidden * vocabulary, bytes=itemsize(device) * numbers)},
        leaves=("hidden", "weight"),
        terms=vocabulary,
        roundings=8,
    )


def workloads(device: str) -> list[Workload]:
    """Label rows of a micro-batch of Parrot, for `benchmarks.gpu_suite`; nothing but label rows on either side."""
    return [_workload(name, shape, device) for name, shape in (CPU_HEADS if device == "cpu" else HEADS).items()]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_linear_cross_entropy(benchmark: Any, case: Case, variant: str) -> None:
    benchmark.extra_info["peak_mb"] = peak_megabytes(case, variant, torch.get_num_threads())
    benchmark.pedantic(make_step(case, variant), rounds=3, warmup_rounds=1)


def main() -> None:
    """Print the table and, with --json, write it."""
    if sys.argv[1:2] == ["--peak-of"]:
        return _print_peak(*sys.argv[2:])
    arguments = parse_arguments(__doc__, repeats=5)
    rows = [measure(case, arguments.repeats, arguments.threads) for case in CASES]
    report("linear_cross_entropy", rows, arguments.json)


if __name__ == "__main__":
    main()
