"""Device memory that outlives a call: kept for each stream, and never part of a CUDA graph's memory.

The kernels of a stream run one after the other, so what a kernel leaves in such memory, or no longer needs, is the next
one's. Two streams run at the same time and never share any. A graph that is being captured gets none of it: nobody
knows on which stream, and beside which kernels, it will be replayed.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_SCRATCH_BYTES = 256 * 1024  # for the descriptors of one program a multiprocessor; larger grids are rare

_scratch: dict[tuple[torch.device, Hashable], Tensor] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now on `device` becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def scratch_of(size: int, device: torch.device, stream: Hashable) -> Tensor:
    """At least `size` bytes for one launch on `stream`, the current one: contents are nobody's before and after.

    Kept, unless it is large or part of a graph: allocating it anew takes as long as all else that a launch needs. A
    kernel must have all of its writes done when the next one starts, so launches may not be programmatic dependent
    ones (which `torch.empty`, whose block comes back at once on the same stream, would not allow either).
    """
    if size > _SCRATCH_BYTES or is_capturing(device):
        return torch.empty(size, dtype=torch.int8, device=device)
    kept = _scratch.get((device, stream))
    if kept is None:
        kept = _scratch[device, stream] = zeros_outside_of_pools(_SCRATCH_BYTES, torch.int8, device)
    return kept


def zeros_outside_of_pools(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that are no part of a graph's memory, ready for the current stream.

    `torch.compile(mode="reduce-overhead")` warms a graph up with all that this thread allocates going to the graph's
    pool, which is reused afterwards: memory that outlives the call must not come from there. Another thread, on a
    stream of its own, gets ordinary memory.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=dtype, device=device)

    def allocate() -> tuple[Tensor, torch.cuda.Stream]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=dtype, device=device), stream

    with ThreadPoolExecutor(max_workers=1) as other:
        zeros, stream = other.submit(allocate).result()
    torch.cuda.current_stream(device).wait_stream(stream)
    return zeros
