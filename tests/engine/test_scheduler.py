"""The scheduler under any arrivals, cancellations and deadlines: nothing leaks, starves or is shared wrongly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from parrot_sys.engine import scheduler as scheduler_module
from parrot_sys.engine.blocks import BlockPool, PictureSpan, block_hashes, root_hash
from parrot_sys.engine.config import AdmissionLimits, SchedulerConfig
from parrot_sys.engine.scheduler import (
    EndReason,
    Phase,
    ScheduledRequest,
    Scheduler,
    Step,
)
from parrot_sys.errors import BusyError, ConfigError, DataError

ROOT = root_hash(b"model")


def make_request(number: int, ids: list[int], new: int = 0, **settings: Any) -> ScheduledRequest:
    settings.setdefault("logits_from", len(ids) - 1)
    return ScheduledRequest(number=number, ids=ids, max_new_tokens=new, root=ROOT, **settings)


def make_scheduler(blocks: int = 8, size: int = 4, **sizes: int) -> Scheduler:
    return Scheduler(SchedulerConfig(**sizes), BlockPool(blocks, size))


class Cache:
    """A cache in which each slot holds what a row's keys and values depend on: all of its request up to it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], object] = {}

    def slot(self, request: ScheduledRequest, row: int) -> tuple[int, int]:
        return request.blocks[row // self.block_size], row % self.block_size

    def content(self, request: ScheduledRequest, row: int) -> object:
        shown = [
            (own.image, own.guidance, row - own.start, own.image is None and request.number)
            for own in request.pictures
            if own.start <= row < own.stop
        ]
        before = self.content(request, row - 1) if row else None
        return hash((before, request.ids[row], tuple(shown)))

    def run(self, step: Step) -> None:
        for chunk in step.chunks:  # as a layer does: all rows are written ...
            for row in range(chunk.start, chunk.stop):
                self.slots[self.slot(chunk.request, row)] = self.content(chunk.request, row)
        for chunk in step.chunks:  # ... before any are read
            for row in range(chunk.stop):
                own = self.slots.get(self.slot(chunk.request, row))
                assert own == self.content(chunk.request, row), f"row {row} of request {chunk.request.number}"


class Serving(RuleBasedStateMachine):
    """Random requests over few ids (so that they share prefixes), some with pictures, on a small cache."""

    @initialize(
        blocks=st.integers(3, 9),
        size=st.integers(1, 4),
        rows=st.integers(1, 9),
        logits=st.integers(1, 9),
        running=st.integers(1, 4),
    )
    def start(self, blocks: int, size: int, rows: int, logits: int, running: int) -> None:
        self.scheduler = make_scheduler(
            blocks,
            size,
            max_rows_per_step=max(rows, running),
            max_logits_per_step=max(logits, running),
            max_running=running,
            max_queue=6,
        )
        self.cache = Cache(size)
        self.number = 0
        self.now = 0.0
        self.admitted: list[int] = []
        self.known: dict[int, ScheduledRequest] = {}
        self.gone: set[int] = set()
        self.rested: set[int] = set()

    @rule(
        ids=st.integers(1, 14).map(lambda count: [0] * count) | st.lists(st.integers(0, 1), min_size=1, max_size=14),
        new=st.integers(0, 6),
        picture=st.sampled_from([None, *itertools.product((b"cat", b"dog", None), (b"", b"where"))]),
        wants_all=st.booleans(),
        patience=st.none() | st.integers(0, 8),
    )
    def submit(self, ids: list[int], new: int, picture: Any, wants_all: bool, patience: int | None) -> None:
        pictures: tuple[PictureSpan, ...] = ()
        if picture is not None:
            image, guidance = picture
            pictures = (PictureSpan(start=1, stop=3, image=image, guidance=guidance),)
        logits_from = 0 if wants_all else len(ids) - 1
        deadline = None if patience is None else self.now + patience
        request = make_request(self.number, ids, new, pictures=pictures, logits_from=logits_from, deadline=deadline)
        self.number += 1
        pool, queued = self.scheduler.pool, len(self.scheduler.waiting)
        try:
            self.scheduler.submit(request)
        except DataError:
            assert len(ids) + new > pool.num_blocks * pool.block_size
        except BusyError:
            assert queued >= 6, "more wait only where resumed or preempted requests, which are never refused, are back"
        else:
            self.known[request.number] = request

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.scheduler.cancel(self.known[number])
        self.gone.add(number)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        request = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        if request.phase is Phase.PAUSED:
            self.scheduler.resume(request)
            assert request.phase is Phase.WAITING
        else:
            self.scheduler.pause(request)
            assert not request.blocks
        self.rested.add(request.number)

    @rule()
    def step(self) -> None:
        self.now += 1
        expired = {
            number for number, own in self.known.items() if own.deadline is not None and self.now >= own.deadline
        }
        resting = {number for number, own in self.known.items() if own.phase is Phase.PAUSED}
        alive = sorted(set(self.known) - self.gone - expired - resting)
        step = self.scheduler.schedule(self.now)
        reasons = {request.number: reason for request, reason in step.dropped}
        assert reasons.keys() == self.gone | expired
        assert all(reasons[number] is EndReason.CANCELLED for number in self.gone)
        assert all(not request.blocks and request.phase is Phase.FINISHED for request, _ in step.dropped)
        for number in reasons:
            del self.known[number]
        self.gone.clear()
        assert step.num_rows <= self.scheduler.config.max_rows_per_step
        assert sum(len(chunk.logits_rows) for chunk in step.chunks) <= self.scheduler.config.max_logits_per_step
        in_step = [chunk.request.number for chunk in step.chunks]
        assert len(set(in_step)) == len(in_step)
        assert not resting & set(in_step)
        self.rested &= set(self.known)
        if alive and not self.rested:
            assert alive[0] in in_step, "the oldest request gets on with every step"
        running = [request.number for request in self.scheduler.running]
        # (One that has rested waits for those that came in meanwhile.)
        assert running == (sorted(running) if self.rested else alive[: len(running)]), "first come, first served"
        answers = [chunk.request for chunk in step.chunks if chunk.request.computed + 1 == len(chunk.request.ids)]
        waits = [request for request in self.scheduler.running if request.computed + 1 == len(request.ids)]
        assert set(map(id, waits)) <= set(map(id, answers)), "every running answer grows"
        self.cache.run(step)
        for chunk in step.chunks:
            self.after(chunk.request, chunk)

    def after(self, request: ScheduledRequest, chunk: Any) -> None:
        assert (chunk.start, chunk.stop > chunk.start) == (request.computed, True)
        wanted = range(request.logits_from, len(request.ids))
        assert not wanted or wanted.start >= chunk.start, "rows whose logits are wanted are not skipped"
        self.scheduler.complete(chunk)
        if request.computed < len(request.ids):
            return
        if request.max_new_tokens:
            self.scheduler.append(request, request.number % 2)
        else:
            self.scheduler.finish(request)
            del self.known[request.number]
            self.gone.discard(request.number)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        held = {block for request in self.scheduler.running for block in request.blocks}
        assert pool.num_free == pool.num_blocks - len(held)
        assert not any(request.blocks for request in self.scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for request in self.known.values():
            self.scheduler.resume(request)
        for _ in range(sum(own.most_rows for own in self.known.values()) + len(self.known) + 1):
            self.step()
        assert not self.known
        assert not self.scheduler.has_requests
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("left_out", ["guidance", "image"])
def test_blocks_that_do_not_know_their_pictures_are_found_out(monkeypatch, left_out: str) -> None:
    def forgetful(parent: bytes, ids: list[int], pictures: Any, block_size: int, *, first: int) -> Any:
        pictures = [replace(own, **{left_out: b""}) for own in pictures]
        return block_hashes(parent, ids, pictures, block_size, first=first)

    monkeypatch.setattr(scheduler_module, "block_hashes", forgetful)
    fixed = settings(TestServing.settings, derandomize=True, max_examples=300, phases=[HypothesisPhase.generate])
    with pytest.raises(AssertionError, match=r"row \d of request"):
        run_state_machine_as_test(Serving, settings=fixed)


def run_all(scheduler: Scheduler, requests: list[ScheduledRequest]) -> list[Step]:
    cache, steps = Cache(scheduler.pool.block_size), []
    for request in requests:
        scheduler.submit(request)
    while scheduler.has_requests:
        steps.append(scheduler.schedule())
        cache.run(steps[-1])
        for chunk in steps[-1].chunks:
            scheduler.complete(chunk)
            if chunk.request.computed == len(chunk.request.ids):
                if chunk.request.max_new_tokens:
                    scheduler.append(chunk.request, 5)
                else:
                    scheduler.finish(chunk.request)
    return steps


def test_continuations_of_a_prompt_share_it_in_one_step() -> None:
    prompt = list(range(100, 110))
    requests = [make_request(i, [*prompt, i, i + 1], logits_from=9) for i in range(4)]
    scheduler = make_scheduler(16)
    for request in requests:
        scheduler.submit(request)
    step = scheduler.schedule()
    assert [(chunk.start, chunk.stop) for chunk in step.chunks] == [(0, 12), (8, 12), (8, 12), (8, 12)]
    assert all(chunk.logits_rows == range(9, 12) for chunk in step.chunks)
    Cache(4).run(step)


def test_answers_first_and_prompts_in_pieces() -> None:
    scheduler = make_scheduler(16, max_rows_per_step=6, max_running=4)
    steps = run_all(scheduler, [make_request(0, [1], 4), make_request(1, list(range(13)), 1)])
    shapes = [[(chunk.request.number, chunk.stop - chunk.start) for chunk in step.chunks] for step in steps]
    assert shapes[:3] == [[(0, 1), (1, 5)], [(0, 1), (1, 5)], [(0, 1), (1, 3)]]


def test_the_newest_request_gives_way_and_goes_on_where_its_blocks_still_are() -> None:
    scheduler = make_scheduler(5, 2, max_rows_per_step=8, max_running=4)
    old, new = make_request(0, [1, 2, 3], 4), make_request(1, [4, 5, 6], 4)
    steps = run_all(scheduler, [old, new])
    assert old.preemptions == 0
    assert new.preemptions > 0
    assert scheduler.num_preemptions == new.preemptions
    again = [chunk for step in steps for chunk in step.chunks if chunk.request is new and chunk.start == new.found_rows]
    assert again, "it was admitted again"


@settings(max_examples=30, deadline=None)
@given(sent=st.integers(0, 20), limit=st.integers(0, 20))
def test_limits_name_themselves(sent: int, limit: int) -> None:
    for name, sizes in {
        "max_prompt_rows": "prompt_rows",
        "max_images": "images",
        "max_pixels": "pixels",
        "max_bytes": "size",
    }.items():
        limits = AdmissionLimits(**{name: limit})
        AdmissionLimits().check(**{sizes: sent})
        if sent > limit:
            with pytest.raises(DataError, match=rf"at most {limit} .*\({name}\), got {sent}"):
                limits.check(**{sizes: sent})
        else:
            limits.check(**{sizes: sent})


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"max_rows_per_step must be at least engine\.max_running=5"):
        SchedulerConfig(max_rows_per_step=4, max_running=5)
    with pytest.raises(ConfigError, match=r"max_logits_per_step must be at least engine\.max_running=5"):
        SchedulerConfig(max_logits_per_step=4, max_running=5)
    with pytest.raises(ConfigError, match="max_queue must be >= 1, got 0"):
        SchedulerConfig(max_queue=0)
