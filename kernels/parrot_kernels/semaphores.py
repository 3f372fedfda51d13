"""Counters of arriving programs, which kernels find at zero and leave at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from parrot_kernels.stream_memory import is_capturing, zeros_outside_of_pools

_semaphores: dict[tuple[torch.device, int], list[Tensor]] = {}


def semaphores(count: int, device: torch.device) -> Tensor:
    """[count or more] int32 zeros that a kernel counts arriving programs in and must leave at zero again.

    Kept for each stream, so that no launch is spent on clearing them. A CUDA graph gets its own, cleared at each
    replay, since nobody knows which streams it will be replayed on.
    """
    if device.type != "cuda" or is_capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    buffers = _semaphores.setdefault((device, torch.cuda.current_stream(device).cuda_stream), [])
    if not buffers or buffers[-1].numel() < count:
        # Smaller ones stay: kernels already in the stream may still count in them.
        buffers.append(zeros_outside_of_pools(max(1024, 2 * count), torch.int32, device))
    return buffers[-1]
