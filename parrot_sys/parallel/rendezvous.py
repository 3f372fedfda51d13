"""Meeting point of a launcher's processes after they were started again."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store

_POLL_SECONDS = 0.01


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """A part of `store` that earlier starts of these processes have not written to.

    torchrun (2.13) keeps one store through all restarts of its workers. Whoever starts first could read there where a
    process that is gone once listened, and would fail to connect. The number of restarts does not tell the starts
    apart: an agent that comes anew to a run counts from 0. So rank 0 gives each start a name, which counts for the
    ranks whose own marks are beside it.

    Args:
        store: seen by all ranks.
        rank: of this process.
        world_size: processes that call this together.
        timeout: until all of them must have come.

    Raises:
        TimeoutError: names the ranks that have not come.
    """
    own, end = uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"mark/{rank}", own)
    name = _name_start(store, own, world_size, end) if rank == 0 else _find_start(store, own, rank, end)
    return PrefixStore(f"start/{name}", store)


def _name_start(store: Store, name: str, world_size: int, end: float) -> str:
    """Rank 0: shows the marks as they are now, with the name, until every rank has found its own."""
    shown: list[bytes] = []
    keys = [f"mark/{rank}" for rank in range(world_size)]
    found = [f"found/{name}/{rank}" for rank in range(1, world_size)]
    while True:
        if store.check(keys) and (marks := store.multi_get(keys)) != shown:
            store.set("named", json.dumps([name, [mark.decode() for mark in marks]]))
            shown = marks
        if store.check(found):
            return name
        if time.monotonic() > end:
            missing = [rank for rank, key in enumerate(found, start=1) if not store.check([key])]
            raise TimeoutError(f"ranks {', '.join(map(str, missing))} of {world_size} did not come to the rendezvous")
        time.sleep(_POLL_SECONDS)


def _find_start(store: Store, own: str, rank: int, end: float) -> str:
    """The name beside which the mark of this rank is put."""
    while time.monotonic() < end:
        if store.check(["named"]):
            name, marks = json.loads(store.get("named"))
            if own in marks:
                store.set(f"found/{name}/{rank}", "")
                return str(name)
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"rank 0 did not come to the rendezvous of rank {rank}")
