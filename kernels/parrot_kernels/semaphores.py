"""Counters of arriving programs, which kernels find at zero and leave at zero."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_semaphores: dict[tuple[torch.device, int], list[Tensor]] = {}


def semaphores(count: int, device: torch.device) -> Tensor:
    """[count or more] int32 zeros that a kernel counts arriving programs in and must leave at zero again.

    Kept for each stream, so that no launch is spent on clearing them. A CUDA graph gets its own, cleared at each
    replay, since nobody knows which streams it will be replayed on.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    buffers = _semaphores.setdefault((device, torch.cuda.current_stream(device).cuda_stream), [])
    if not buffers or buffers[-1].numel() < count:
        # Smaller ones stay: kernels already in the stream may still count in them.
        buffers.append(_outside_of_pools(max(1024, 2 * count), device))
    return buffers[-1]


def _outside_of_pools(count: int, device: torch.device) -> Tensor:
    """Zeros that are no part of a graph's memory, ready for the current stream.

    `torch.compile(mode="reduce-overhead")` warms a graph up with all that this thread allocates going to the graph's
    pool, which is reused afterwards: counters that outlive the call must not come from there. Another thread, on a
    stream of its own, gets ordinary memory.
    """

    def allocate() -> tuple[Tensor, torch.cuda.Stream]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=device), stream

    with ThreadPoolExecutor(max_workers=1) as other:
        zeros, stream = other.submit(allocate).result()
    torch.cuda.current_stream(device).wait_stream(stream)
    return zeros
