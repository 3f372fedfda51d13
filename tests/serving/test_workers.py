"""Threads that prepare requests: who waits for something outside keeps nobody from working."""

from __future__ import annotations

import threading

import pytest

from parrot_sys.serving.workers import AllWaitError, Workers, outside


def test_others_work_while_one_waits_outside() -> None:
    begun, over = threading.Event(), threading.Event()

    def waits() -> str:
        with outside():
            begun.set()
            assert over.wait(10)
        return "waited"

    def one_too_many() -> None:
        with outside():
            raise AssertionError("only one may wait")

    with Workers(1, waiting=1) as workers:
        first = workers.submit(waits)
        assert begun.wait(10)
        assert workers.submit(lambda: "worked").result(10) == "worked"
        with pytest.raises(AllWaitError):
            workers.submit(one_too_many).result(10)
        over.set()
        assert first.result(10) == "waited"
        assert workers.submit(one_too_many).exception(10).__class__ is AssertionError, "its place is free again"


def test_no_more_work_than_may() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def works() -> None:
        nonlocal now, most
        for place in range(3):
            with lock:
                now += 1
                most = max(most, now)
            threading.Event().wait(0.001)
            with lock:
                now -= 1
            if place < 2:
                with outside():
                    threading.Event().wait(0.001)

    with Workers(2, waiting=8) as workers:
        for done in [workers.submit(works) for _ in range(8)]:
            done.result(10)
    assert most == 2


def test_other_threads_wait_as_they_are() -> None:
    with outside():
        pass
