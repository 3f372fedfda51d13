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
    flush = Flush(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, "cuda")
    host, estimate, each_flush = _single_times(runs[0], flush)
    # As many flushes as it takes the host to enqueue one run: the GPU never waits for the host, and what is timed is
    # what a busy training step sees. (A run that itself waits for the GPU is timed with its waiting.)
    backlog = min(_MAX_BACKLOG, 1 + int(1.5 * host / each_flush))
    each = max(host, estimate + backlog * each_flush)
    rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, int(seconds / each)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for number, (start, end) in enumerate(events):
        for _ in range(backlog):
            flush()
        start.record()
        runs[number % len(runs)]()
        end.record()
    torch.cuda.synchronize()
    return {**_summary([start.elapsed_time(end) for start, end in events], runs), "host_ms": 1e3 * host}


class Flush:
    """Leaves nothing of the inputs in a cache of `size` bytes, by reading twice as many.

    Written bytes would still have to go to memory while the next run is timed.
    """

    def __init__(self, size: int, device: str) -> None:
        self._read = torch.zeros(2 * size // 4, dtype=torch.int32, device=device)
        self._largest = torch.zeros((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Enqueues the reading."""
        torch.amax(self._read, 0, out=self._largest)


def _single_times(run: Callable[[], object], flush: Flush) -> tuple[float, float, float]:
    """Seconds that the host takes to enqueue `run`, that it takes in all, and that one flush takes."""
    flush()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(10):
        flush()
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
