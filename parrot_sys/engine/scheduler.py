"""Which rows of which requests run in the next step: rows that continue answers first, then prompts in pieces.

Requests come first, are served first: they are admitted in the order of their arrival, and when blocks run out the one
that came last gives its own back and is computed again later. The oldest request is never preempted, and a request
that could never fit is refused, so each one gets its answer. A request gets the blocks of all its rows so far when it
is admitted, so only rows that continue answers ever need another one.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from parrot_sys.engine.blocks import BlockHash, BlockPool, PictureSpan, block_hashes
from parrot_sys.engine.config import SchedulerConfig
from parrot_sys.errors import BusyError, DataError


class Phase(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


class EndReason(Enum):
    """Reason why a request left before its answer was complete."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(kw_only=True, slots=True, eq=False)
class ScheduledRequest:
    """A request as the scheduler sees it: rows, and where their keys and values are."""

    number: int
    """Place in the order of arrival."""
    ids: list[int]
    """Id of each row: the prompt with its pictures expanded, then the answer so far."""
    max_new_tokens: int
    """Longest answer; 0 for a prompt that is only read."""
    root: BlockHash
    """Parent of its first block."""
    pictures: tuple[PictureSpan, ...] = ()
    """Rows that hold or read pictures, ascending."""
    logits_from: int
    """First row whose logits are still wanted."""
    deadline: float | None = None
    """Time after which nobody waits for the answer, by the clock that `schedule` is given."""
    phase: Phase = Phase.WAITING
    computed: int = 0
    """Rows whose keys and values are in the cache after the steps so far."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Identities of its whole blocks, as far as they are worked out."""
    found_rows: int = 0
    """Rows that were in the cache when it was admitted last."""
    admissions: int = 0
    """How often it got blocks: after each time it has others, also where none of its rows has to run again."""
    preemptions: int = 0

    @property
    def most_rows(self) -> int:
        """Rows that it may come to hold."""
        return len(self.ids) + self.max_new_tokens

    def identify(self, block_size: int) -> list[BlockHash]:
        """Identities of its whole blocks so far."""
        known = len(self.hashes)
        parent = self.hashes[-1] if known else self.root
        self.hashes.extend(block_hashes(parent, self.ids, self.pictures, block_size, first=known))
        return self.hashes


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive rows of one request that run in a step."""

    request: ScheduledRequest
    start: int
    stop: int

    @property
    def logits_rows(self) -> range:
        """Rows of the request whose logits are wanted."""
        return range(max(self.start, self.request.logits_from), self.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Rows that run together, and requests that left without having finished."""

    chunks: list[Chunk]
    dropped: list[tuple[ScheduledRequest, EndReason]]

    @property
    def num_rows(self) -> int:
        """Rows of all requests."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(kw_only=True, slots=True)
class _Budget:
    """Rows and logits that a step has left."""

    rows: int
    logits: int

    @property
    def has_room(self) -> bool:
        """Whether one more row fits, whichever it is."""
        return bool(self.rows and self.logits)

    def take(self, request: ScheduledRequest) -> int:
        """Takes the next rows of a request, at least one; where they stop."""
        start = request.computed
        first = max(start, request.logits_from)
        stop = min(start + self.rows, first + self.logits, len(request.ids))
        self.rows -= stop - start
        self.logits -= max(stop - first, 0)
        return stop


class Scheduler:
    """Queue, running requests and their blocks. One thread calls it: schedule, run the model, complete, again."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        """
        Args:
            config: sizes.
            pool: blocks of the cache, of which nobody else takes any.
        """
        self.config = config
        self.pool = pool
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: list[ScheduledRequest] = []
        """In the order of arrival."""
        self.num_preemptions = 0
        self._cancelled: dict[int, ScheduledRequest] = {}
        self._paused: dict[int, ScheduledRequest] = {}
        self._newest = -1

    @property
    def has_requests(self) -> bool:
        """Whether anything waits or runs, or has to be taken out; requests that are paused do not count."""
        return bool(self.waiting or self.running or self._cancelled)

    @property
    def num_paused(self) -> int:
        """Requests that rest."""
        return len(self._paused)

    def check(self, request: ScheduledRequest) -> None:
        """Refuses a request that would never fit.

        Raises:
            DataError: all blocks together hold fewer rows than the request may come to have.
        """
        if self.pool.blocks_for(request.most_rows) > self.pool.num_blocks:
            raise DataError(
                f"the request may come to have {request.most_rows} rows, the cache holds "
                f"{self.pool.num_blocks * self.pool.block_size} of all requests: shorten it, ask for a shorter answer, "
                "or start the engine with more blocks"
            )

    def submit(self, request: ScheduledRequest) -> None:
        """Puts a request at the end of the queue.

        Raises:
            DataError: it would never fit.
            BusyError: the queue is full.
        """
        assert request.number > self._newest, f"request {request.number} must come after request {self._newest}"
        self.check(request)
        if len(self.waiting) >= self.config.max_queue:
            raise BusyError(f"{len(self.waiting)} requests wait already (engine.max_queue): try again later")
        self._newest = request.number
        self.waiting.append(request)

    def cancel(self, request: ScheduledRequest) -> None:
        """Takes a request out; the next step has none of its rows, and its blocks are free for that step."""
        if request.phase is not Phase.FINISHED:
            self._cancelled[request.number] = request

    def pause(self, request: ScheduledRequest) -> None:
        """Lets a request rest without blocks until `resume`, when it goes on with those that are still as they were."""
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
            self._free(request)
            request.computed = 0
        elif request.phase is Phase.WAITING:
            self.waiting.remove(request)
        else:
            return
        request.phase = Phase.PAUSED
        self._paused[request.number] = request

    def resume(self, request: ScheduledRequest) -> None:
        """Puts a request that was paused back into the queue, at its place by the order of arrival."""
        if self._paused.pop(request.number, None) is not None:
            request.phase = Phase.WAITING
            self._requeue(request)

    def schedule(self, now: float = 0.0) -> Step:
        """Rows of the next step. Each chunk must then be run and completed before the next call.

        Args:
            now: time, for deadlines.
        """
        dropped = self._drop(now)
        left = _Budget(rows=self.config.max_rows_per_step, logits=self.config.max_logits_per_step)
        chunks: list[Chunk] = []
        for request in list(self.running):
            one_row = len(request.ids) - request.computed == 1
            if one_row and request.phase is Phase.RUNNING and self._make_room(request):
                chunks.append(self._take(request, left))
        for request in self.running:
            if left.has_room and len(request.ids) - request.computed > 1:
                chunks.append(self._take(request, left))
        while left.has_room and (admitted := self._admit()):
            chunks.append(self._take(admitted, left))
        return Step(chunks=chunks, dropped=dropped)

    def complete(self, chunk: Chunk) -> None:
        """Notes that the model has run a chunk."""
        request = chunk.request
        request.computed = chunk.stop
        request.logits_from = max(request.logits_from, chunk.stop)

    def append(self, request: ScheduledRequest, token: int) -> None:
        """One more row of an answer, which a following step runs."""
        assert request.computed == len(request.ids), "all earlier rows must have run"
        assert request.max_new_tokens > 0, "the answer is as long as it may get"
        request.ids.append(token)
        request.max_new_tokens -= 1

    def finish(self, request: ScheduledRequest) -> None:
        """Takes a request out whose answer is complete, and frees its blocks."""
        if request.phase is Phase.FINISHED:
            return
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
        elif request.phase is Phase.PAUSED:
            del self._paused[request.number]
        else:
            self.waiting.remove(request)
        self._free(request)
        request.phase = Phase.FINISHED
        self._cancelled.pop(request.number, None)

    def forget_step(self) -> None:
        """After a step that failed: no block is known again, as some may not hold what they should."""
        self.pool.forget_all()

    def _drop(self, now: float) -> list[tuple[ScheduledRequest, EndReason]]:
        """Takes out all that nobody waits for any more."""
        dropped = []
        for request in (*self.running, *self.waiting, *self._paused.values()):
            if request.number in self._cancelled:
                dropped.append((request, EndReason.CANCELLED))
            elif request.deadline is not None and now >= request.deadline:
                dropped.append((request, EndReason.EXPIRED))
        for request, _ in dropped:
            self.finish(request)
        self._cancelled.clear()
        return dropped

    def _take(self, request: ScheduledRequest, left: _Budget) -> Chunk:
        """The next rows of a request, as many as the step has left; blocks that they fill can be found from now on.

        Requests of the same step may share them: in each layer all rows are written before any are read.
        """
        start, stop = request.computed, left.take(request)
        size = self.pool.block_size
        if stop // size > start // size:
            hashes = request.identify(size)
            for block in range(start // size, min(stop // size, len(hashes))):
                self.pool.register(request.blocks[block], hashes[block])
        return Chunk(request=request, start=start, stop=stop)

    def _make_room(self, request: ScheduledRequest) -> bool:
        """A block for the last row of a running request; False when it had to leave for others itself."""
        while len(request.blocks) < self.pool.blocks_for(len(request.ids)):
            blocks = self.pool.allocate(1)
            if blocks is not None:
                request.blocks += blocks
                continue
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _preempt(self, request: ScheduledRequest) -> None:
        """Back into the queue, to be computed again."""
        self.running.remove(request)
        self._free(request)
        request.phase, request.computed = Phase.WAITING, 0
        request.preemptions += 1
        self.num_preemptions += 1
        self._requeue(request)

    def _requeue(self, request: ScheduledRequest) -> None:
        """Into the queue before all that came later."""
        place = next((i for i, other in enumerate(self.waiting) if other.number > request.number), len(self.waiting))
        self.waiting.insert(place, request)

    def _free(self, request: ScheduledRequest) -> None:
        self.pool.release(request.blocks)
        request.blocks = []

    def _admit(self) -> ScheduledRequest | None:
        """Takes the head of the queue, if there is room, and gives it the blocks of all its rows so far."""
        if not self.waiting or len(self.running) >= self.config.max_running:
            return None
        request = self.waiting[0]
        found = self._found(request)
        needed = self.pool.blocks_for(len(request.ids)) - len(found)
        # One block more for each running request, or admitting would only preempt.
        if needed + len(self.running) > self.pool.num_free_without(found):
            return None
        self.pool.hold(found)
        blocks = self.pool.allocate(needed)
        assert blocks is not None, "there were enough free blocks"
        self.waiting.popleft()
        request.blocks = found + blocks
        request.computed = request.found_rows = len(found) * self.pool.block_size
        request.phase = Phase.RUNNING
        request.admissions += 1
        bisect.insort(self.running, request, key=lambda own: own.number)  # (one that was paused may be older)
        return request

    def _found(self, request: ScheduledRequest) -> list[int]:
        """Blocks of its rows that are there already; at least one row is left to run, and all whose logits it wants."""
        size = self.pool.block_size
        usable = min(request.logits_from, len(request.ids) - 1) // size
        hashes = request.identify(size)[:usable]
        found = self.pool.find(hashes)
        self.pool.queries += usable
        self.pool.hits += len(found)
        return found
