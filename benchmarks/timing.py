"""Times of one function on a GPU (CUDA events, cold L2) or a CPU (wall clock)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Runs = Sequence[Callable[[], object]]
"""The same work on different input sets, which are taken in turns."""

_MIN_ROUNDS, _MAX_ROUNDS = 5, 100
_MAX_BACKLOG = 50


def time_runs(runs: Runs, device: str, seconds: float) -> dict[str, Any]:
    """Median, spread and number of the times in milliseconds, from about `seconds` of measuring after a warm-up."""
    for run in runs:
        run()
    return _on_gpu(runs, seconds) if device == "cuda" else _on_cpu(runs, seconds)


def _on_cpu(runs: Runs, seconds: float) -> dict[str, Any]:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < _MIN_ROUNDS or (len(times) < _MAX_ROUNDS and time.perf_counter() < until):
        run = runs[len(times) % len(runs)]
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return _summary(times, runs)


def _on_gpu(runs: Runs, seconds: float) -> dict[str, Any]:
    # Writing twice the L2 leaves nothing of the inputs in it.
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flushed = torch.empty(2 * l2, dtype=torch.int8, device="cuda")
    host, estimate, flush = _single_times(runs[0], flushed)
    # As many flushes as it takes the host to enqueue one run: the GPU never waits for the host, and what is timed is
    # what a busy training step sees. (A run that itself waits for the GPU is timed with its waiting.)
    backlog = min(_MAX_BACKLOG, 1 + int(1.5 * host / flush))
    each = max(host, estimate + backlog * flush)
    rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(seconds / each)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for number, (start, end) in enumerate(events):
        for _ in range(backlog):
            flushed.zero_()
        start.record()
        runs[number % len(runs)]()
        end.record()
    torch.cuda.synchronize()
    return {**_summary([start.elapsed_time(end) for start, end in events], runs), "host_ms": 1e3 * host}


def _single_times(run: Callable[[], object], flushed: torch.Tensor) -> tuple[float, float, float]:
    """Seconds that the host takes to enqueue `run`, that it takes in all, and that one flush takes."""
    flushed.zero_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(10):
        flushed.zero_()
    torch.cuda.synchronize()
    return host, whole, (time.perf_counter() - start) / 10


def _summary(times: list[float], runs: Runs) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "ms": statistics.median(ordered),
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[(9 * len(ordered)) // 10],
        "min_ms": ordered[0],
        "rounds": len(ordered),
        "input_sets": len(runs),
    }
