"""ShardStream: the records of one data set for one rank, shard by shard, in an order that a few numbers continue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parrot_sys.data.mixture import permutation
from parrot_sys.data.sources.base import Place, RecordSource
from parrot_sys.data.stream.shards import Shard
from parrot_sys.errors import DataError, printable


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that was drawn and not yet read."""

    shard: int
    number: int
    """Of the record in its shard, from 0."""
    place: Place
    source: RecordSource
    """The open shard."""


@dataclass(slots=True)
class _Cursor:
    """An open shard, and how far it was read."""

    shard: int
    source: RecordSource
    places: Iterator[Place]
    passed: int


class ShardStream:
    """Passes over all shards one after the other, without an end.

    A pass takes the shards in a random order and deals them to the ranks; where there are fewer shards than ranks, each
    rank reads all of them and takes every n-th record. A rank reads a few shards at once, a record of each in turn, and
    draws a random order for each window of so many records. Everything depends on seed, rank, number of ranks and the
    shards only, so the state is the place where the window began and how many of its records were drawn.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        seed: Sequence[int],
        rank: int,
        ranks: int,
        window: int,
        open_shards: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            shards: at least one.
            seed: of the order.
            rank: of `ranks` that share the records.
            ranks: see above.
            window: records whose order is drawn together.
            open_shards: shards that are read at once.
            state: goes on where the stream was that had this `state`.
        """
        self._shards, self._seed, self._rank, self._ranks = shards, list(seed), rank, ranks
        self._size, self._open_shards = window, open_shards
        self._start: dict[str, Any] = {"pass": 0, "next": 0, "open": [], "turn": 0, "windows": 0}
        self._window: list[Entry | None] = []
        self._order = np.empty(0, dtype=np.int64)
        self._taken = 0
        if state is not None:
            self._start = {name: state[name] for name in self._start}
        self._restore()
        if state is not None and state["taken"]:
            self._fill()
            self._taken = state["taken"]
            for at in self._order[: self._taken].tolist():
                self._window[at] = None

    @property
    def state(self) -> dict[str, Any]:
        """Plain values by which another stream goes on after the last record drawn."""
        return self._start | {"taken": self._taken}

    @property
    def passes(self) -> int:
        """Whole passes before the window."""
        return int(self._start["pass"])

    def draw(self) -> Entry:
        """The next record.

        Raises:
            DataError: a whole pass has no record for this rank.
        """
        if self._taken == len(self._window):
            if self._window:
                self._start = self._here()
            self._taken = 0
            self._fill()
        at = int(self._order[self._taken])
        entry, self._window[at] = self._window[at], None  # (a shard is closed when its last record was used)
        self._taken += 1
        assert entry is not None, "each record of a window is drawn once"
        return entry

    def _here(self) -> dict[str, Any]:
        """State of the readers, at the end of a window."""
        return {
            "pass": self._pass,
            "next": self._next,
            "open": [[cursor.shard, cursor.passed] for cursor in self._cursors],
            "turn": self._turn,
            "windows": self._start["windows"] + 1,
        }

    def _restore(self) -> None:
        self._pass, self._next, self._turn = (int(self._start[name]) for name in ("pass", "next", "turn"))
        self._own = self._deal()
        self._cursors = [self._open(shard, passed) for shard, passed in self._start["open"]]

    def _deal(self) -> list[int]:
        """This rank's shards of the pass, in their order."""
        order = permutation(np.random.PCG64(np.random.SeedSequence([*self._seed, 0, self._pass])), len(self._shards))
        return order.tolist() if self._strides else order[self._rank :: self._ranks].tolist()

    @property
    def _strides(self) -> bool:
        return len(self._shards) < self._ranks

    def _open(self, shard: int, passed: int) -> _Cursor:
        source = self._shards[shard].open()
        source.state()  # (from here on a change of the file is an error)
        places = source.scan()
        return _Cursor(shard, source, itertools.islice(places, passed, None), passed)

    def _fill(self) -> None:
        """Reads places to the end of the window, or of the pass, and draws their order."""
        window: list[Entry | None] = list(itertools.islice(self._pull(), self._size))
        if not window:  # the pass had ended with the window before
            self._pass, self._next, self._turn = self._pass + 1, 0, 0
            self._own = self._deal()
            self._start |= {"pass": self._pass, "next": 0, "open": [], "turn": 0}
            window = list(itertools.islice(self._pull(), self._size))
        if not window:
            raise DataError(f"no record of {printable(self._shards[0].name)} and its other shards is for this rank")
        stream = np.random.PCG64(np.random.SeedSequence([*self._seed, 1 + self._rank, self._start["windows"]]))
        self._window, self._order = window, permutation(stream, len(window))

    def _pull(self) -> Iterator[Entry]:
        """Records of this rank to the end of the pass, one of each open shard in turn."""
        while True:
            while len(self._cursors) < self._open_shards and self._next < len(self._own):
                self._cursors.append(self._open(self._own[self._next], 0))
                self._next += 1
            if not self._cursors:
                return
            self._turn %= len(self._cursors)
            cursor = self._cursors[self._turn]
            place = next(cursor.places, None)
            if place is None:
                del self._cursors[self._turn]
                continue
            number, cursor.passed = cursor.passed, cursor.passed + 1
            self._turn += 1
            if not self._strides or number % self._ranks == self._rank:
                yield Entry(cursor.shard, number, place, cursor.source)
