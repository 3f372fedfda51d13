"""Agreement of the data-parallel ranks that read a stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from parrot_sys.data.stream.loader import StreamRanks
from parrot_sys.megatron.runtime.optimizer import data_parallel_rank, data_parallel_world_size


def stream_ranks() -> StreamRanks:
    """The place of this rank among them; every rank calls this."""
    own = data_parallel_rank()
    # (Messages cross while the device works: over gloo, in a group of their own.)
    group = dist.new_group(backend="gloo")

    def most(count: int) -> int:
        largest = torch.tensor(count)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        return int(largest)

    def gather(value: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (own, value), group=group)
        return [each for _, each in sorted(dict(everyone).items())]

    return StreamRanks(rank=own, size=data_parallel_world_size(), most=most, gather=gather)
