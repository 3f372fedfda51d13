"""Measures one contender of a workload: is its result ours, and how fast is it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine, saved_bytes
from benchmarks.timing import time_runs
from benchmarks.workload import (
    Broke,
    Contender,
    Cost,
    Inputs,
    Maker,
    Pass,
    Run,
    Unavailable,
    Workload,
    difference,
    tolerance,
)
from parrot_sys.ops import force_backend
from parrot_sys.ops.registry import BACKENDS

Measurement = dict[str, Any]

# H200: a large device-to-device copy and an 8192^3 bfloat16 product on random data; what the targets refer to.
H200_FLOPS, H200_BYTES = 790e12, 4.3e12
# Several input sets as long as they fit here; weights are not counted, there is one set of them.
_BYTES_OF_INPUT_SETS, _INPUT_SETS = 16e9, 3


class Mismatch(Exception):
    """A contender's result is not ours."""


def contender_of(workload: Workload, name: str) -> Contender:
    """A peer, or ours under the name of a back end."""
    if name in workload.peers:
        return workload.peers[name]
    return Contender(build=workload.ours)


@contextmanager
def running_as(workload: Workload, name: str) -> Iterator[None]:
    """Forces the back end that `name` stands for; a refusal becomes Unavailable, and so does whatever a peer raises."""
    ours = name not in workload.peers
    forced: AbstractContextManager[None] = force_backend(name) if ours and name in BACKENDS else nullcontext()
    with forced:
        try:
            yield
        except NotImplementedError as error:  # a back end's refusal (ops/registry.py): reported, with its reason
            raise Unavailable(str(error)) from error
        except Exception as error:
            if ours or isinstance(error, Unavailable | Mismatch):
                raise
            raise Broke(f"{type(error).__name__}: {error}") from error


class InputSets:
    """Weights once, data several times."""

    def __init__(self, workload: Workload, device: str) -> None:
        weights = workload.weights(Maker.seeded(device, 0))
        first = workload.data(Maker.seeded(device, 1))
        nbytes = sum(tensor.nbytes for tensor in first.values())
        count = max(1, min(_INPUT_SETS, int(_BYTES_OF_INPUT_SETS / max(1, nbytes))))
        data = [first, *(workload.data(Maker.seeded(device, 1 + i)) for i in range(1, count))]
        for tensors in (weights, *data):
            for name in workload.leaves:
                if name in tensors:
                    tensors[name].requires_grad_()
        self.sets: list[Inputs] = [{**weights, **own} for own in data]


def gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Incoming gradients of a pass, the same at every call."""
    makers = (Maker.seeded(out.device.type, 99 + i) for i, out in enumerate(outputs))
    return [m.normal(*out.shape, dtype=out.dtype) for m, out in zip(makers, outputs, strict=True)]


def pass_runs(workload: Workload, contender: Contender, inputs: Inputs) -> dict[Pass, Callable[[], object]]:
    """A function for each pass that the workload costs and the contender has."""
    prepared = workload.prepare(contender, inputs)
    run, leaves = prepared.run, prepared.leaves
    found: dict[Pass, Callable[[], object]] = {}
    if "fwd" in workload.costs:
        found["fwd"] = run
    if not contender.backward or not workload.leaves:
        return found
    if "bwd" in workload.costs:
        outputs = run()
        grads = gradients(outputs)
        found["bwd"] = lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    if "fwd_bwd" in workload.costs:
        found["fwd_bwd"] = lambda: _both(run, leaves)
    return found


def _both(run: Run, leaves: Sequence[Tensor]) -> object:
    outputs = run()
    # The gradient of a sum, which some peers assume already in their forward pass.
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs], allow_unused=True)


def results(workload: Workload, contender: Contender, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and, where both it and the check want them, gradients by name."""
    prepared = workload.prepare(contender, inputs)
    outputs = prepared.run()
    found = {f"output_{i}": out.detach() for i, out in enumerate(prepared.outputs(outputs))}
    if contender.backward and workload.leaves and contender.checked == "all":
        incoming = [torch.ones_like(out) for out in outputs] if "fwd_bwd" in workload.costs else gradients(outputs)
        grads = prepared.merge(torch.autograd.grad(outputs, prepared.leaves, incoming, allow_unused=True))
        named = zip(workload.leaves, grads, strict=True)
        found |= {f"grad_{name}": grad for name, grad in named if grad is not None}
    return found


def check(workload: Workload, name: str, inputs: Inputs) -> dict[str, float]:
    """Differences from our own results, by name.

    Raises:
        Mismatch: one is above the tolerance, or the results of a peer that must match lack one of ours.
    """
    contender = contender_of(workload, name)
    if contender.checked == "nothing":
        return {}
    ours = results(workload, Contender(build=workload.ours, backward=contender.checked == "all"), inputs)
    with running_as(workload, name):
        own = results(workload, contender, inputs)
    if contender.checked == "all" and contender.backward and own.keys() != ours.keys():
        raise Mismatch(f"gives {sorted(own)}, ours {sorted(ours)}")
    found = {key: difference(value, ours[key]) for key, value in own.items()}
    bound = tolerance(inputs[(*workload.leaves, *inputs)[0]].dtype, workload.terms, workload.roundings)
    wrong = {key: value for key, value in found.items() if not value <= bound}
    if wrong:
        raise Mismatch(f"differs from ours by {wrong}, at most {bound:.2e} is rounding")
    return found


def measure(workload: Workload, name: str, device: str, seconds: float = 0.25) -> Measurement:
    """Checks and times one contender.

    Args:
        workload: what to compute.
        name: one of its peers, or of `our_contenders`.
        device: "cuda" or "cpu".
        seconds: measuring time of each pass.

    Raises:
        Unavailable: it cannot run here.
        Mismatch: its result is not ours.
    """
    inputs = InputSets(workload, device).sets
    differences = check(workload, name, inputs[0])
    contender = contender_of(workload, name)
    row: Measurement = {"difference": differences, "passes": {}}
    with running_as(workload, name):
        if contender.backward and workload.leaves:
            row["saved_mb"] = saved_megabytes(workload, contender, inputs[0])
        by_set = [pass_runs(workload, contender, each) for each in inputs]
        for which in by_set[0]:
            row["passes"][which] = time_runs([runs[which] for runs in by_set], device, seconds)
    for which, times in row["passes"].items():
        times |= rates(workload.costs[which], times["ms"])
    return row


def saved_megabytes(workload: Workload, contender: Contender, inputs: Inputs) -> float:
    """Megabytes that a forward pass keeps for its backward pass, besides inputs and parameters."""
    prepared = workload.prepare(contender, inputs)
    return saved_bytes(prepared.run, [*inputs.values(), *prepared.leaves]) / 1e6


def rates(cost: Cost, ms: float) -> dict[str, float]:
    """Achieved operations and bytes a second."""
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "tflops": cost.flops / ms / 1e9,
        "gbytes_s": cost.bytes / ms / 1e6,
    }


def main(description: str | None, workloads: Callable[[str], list[Workload]]) -> None:
    """Command line of one `bench_<op>.py`: a table of every workload and contender."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="only workloads whose name holds this")
    parser.add_argument("--seconds", type=float, default=0.25, help="measuring time of each pass (default 0.25)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for workload in workloads(args.device):
        if args.only not in workload.id:
            continue
        for name in (*workload.our_contenders(args.device), *workload.peers):
            try:
                measured = measure(workload, name, args.device, args.seconds)
            except Unavailable as error:
                print(f"{workload.id:45} {name:16} not available: {str(error).splitlines()[0]}")
                continue
            rows.append({"workload": workload.id, "contender": name, **measured})
            for which, times in measured["passes"].items():
                print(
                    f"{workload.id:45} {name:16} {which:7} {times['ms']:10.4f} ms "
                    f"(p10 {times['p10_ms']:.4f}, p90 {times['p90_ms']:.4f}) "
                    f"{times['tflops']:9.3f} TFLOP/s {times['gbytes_s']:9.2f} GB/s"
                )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def pytest_cases(workloads: list[Workload], device: str = "cpu") -> list[Any]:
    """Parameters (workload, contender, pass) for a pytest-benchmark function."""
    import pytest

    return [
        pytest.param(workload, name, which, id=f"{workload.name}-{name}-{which}")
        for workload in workloads
        for name in (*workload.our_contenders(device), *workload.peers)
        for which in workload.costs
        if which == "fwd" or contender_of(workload, name).backward
    ]


def run_under_pytest(benchmark: Any, workload: Workload, name: str, which: Pass) -> None:
    """Checks the contender's result, then lets pytest-benchmark time one pass; skips a peer that is not here."""
    import pytest

    inputs = InputSets(workload, "cpu").sets[0]
    try:
        benchmark.extra_info["difference"] = check(workload, name, inputs)
        with running_as(workload, name):
            run = pass_runs(workload, contender_of(workload, name), inputs)[which]
            benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    except Unavailable as error:
        pytest.skip(str(error))  # a contender that cannot run on this device or is not installed; the text says which
