"""Processes that meet in a store which earlier ones have used."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from parrot_sys.parallel.rendezvous import fresh_store

SECONDS = timedelta(seconds=20)


def _start(store: dist.Store, world_size: int, first: int) -> list[dist.Store]:
    """All ranks come, rank `first` well before the others."""

    def come(rank: int) -> dist.Store:
        if rank != first:
            time.sleep(0.1)
        return fresh_store(store, rank, world_size, SECONDS)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(come, range(world_size)))


@pytest.mark.parametrize("first", [0, 2])
def test_each_start_has_a_part_of_its_own(first: int) -> None:
    store = dist.HashStore()
    for size in (3, 3, 4, 3):
        parts = _start(store, size, first)
        assert not any(part.check(["address"]) for part in parts), "nothing of an earlier start is seen"
        parts[0].set("address", str(size))
        assert [part.get("address") for part in parts] == [str(size).encode()] * size


def test_ranks_that_stay_away_are_named() -> None:
    store = dist.HashStore()
    _start(store, 3, 0)
    with pytest.raises(TimeoutError, match="ranks 1, 2 of 3 did not come"):
        fresh_store(store, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="rank 0 did not come to the rendezvous of rank 1"):
        fresh_store(store, 1, 3, timedelta(seconds=0.1))
