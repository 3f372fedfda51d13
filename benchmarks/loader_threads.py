"""What the interpreter's lock costs our loader: pictures by threads against worker processes, and steps that it feeds.

`bench_loader` runs both; see there for the data.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WAYS = ("threads", "processes")
PASSES = 3  # over the pictures, so that starting processes does not count much


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """Pictures as a DataLoader of torch reads them in its worker processes."""

    def __init__(self, processor: Any, files: Sequence[Path]) -> None:
        self._processor, self._files = processor, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> Tensor:
        pixels: Tensor = self._processor.pictures([str(self._files[place])])[0].pixel_values
        return pixels


def decode(processor: Any, files: Sequence[Path], way: str, workers: int) -> dict[str, Any]:
    """Decodes and resizes pictures as the loader does, for a thread of this process that takes them."""
    pictures = _Pictures(processor, list(files) * PASSES)
    torch.set_num_threads(1)
    begun, start = processor_seconds(), time.perf_counter()
    total = sum(float(pixels[0, 0, 0, 0]) for pixels in _read(pictures, way, workers))
    seconds = time.perf_counter() - start
    return {
        "way": way,
        "workers": workers,
        "pictures_per_second": len(pictures) / seconds,
        "pictures_per_core_second": len(pictures) / (processor_seconds() - begun),
        "check": total,
    }


def _read(pictures: _Pictures, way: str, workers: int) -> Iterator[Tensor]:
    if way == "processes":  # (which hand pictures over in shared memory)
        yield from torch.utils.data.DataLoader(pictures, batch_size=None, num_workers=workers, prefetch_factor=8)
        return
    with ThreadPoolExecutor(workers) as threads:
        for first in range(0, len(pictures), 8 * workers):
            places = range(first, min(first + 8 * workers, len(pictures)))
            yield from threads.map(pictures.__getitem__, places)


def feed(steps: Iterator[Any], count: int, seconds: float, work: Callable[[float], float]) -> dict[str, Any]:
    """How long a step waits for its samples, and how long its own work takes beside the threads of the loader.

    Args:
        steps: the loader's.
        count: steps to take.
        seconds: that the work of a step takes when it is alone.
        work: does that work; the seconds that it took.
    """
    waits, worked = [], []
    begun = processor_seconds()
    for _ in range(count):
        start = time.perf_counter()
        batches = next(steps)
        waits.append(time.perf_counter() - start)
        worked.append(work(seconds))
        del batches  # (as in training, where a step holds its samples to its end: freeing them is no wait for others)
    return {
        "steps": count,
        "first_wait": waits[0],
        "median_wait": statistics.median(waits[1:]),
        "longest_wait_after_the_first_step": max(waits[1:]),
        "median_step_seconds": statistics.median(worked),
        "processor_seconds_a_step": (processor_seconds() - begun) / count,
    }


def sleep(seconds: float) -> float:
    """A step that the GPU does: this thread only waits."""
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start


def interpret(rounds: int) -> float:
    """A step that needs the interpreter all the time, as one that launches small kernels does; its seconds."""
    start, value = time.perf_counter(), 0
    for number in range(rounds):
        value ^= number
    return time.perf_counter() - start


def rounds_of(seconds: float) -> int:
    """Rounds of `interpret` that take so long on an idle machine."""
    fewest = min(interpret(200_000) for _ in range(5))
    return int(200_000 * seconds / fewest)
