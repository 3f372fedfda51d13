"""Threads that prepare requests, of which none is kept by what has to come from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
_OWN = threading.local()


class AllWaitError(Exception):
    """As many threads wait already as may."""


class Workers(ThreadPoolExecutor):
    """Runs calls in threads; so many work at the same time, and so many more may wait within `outside`."""

    def __init__(self, working: int, waiting: int) -> None:
        """
        Args:
            working: most calls that work at the same time.
            waiting: most calls that wait for something outside.
        """
        super().__init__(working + waiting, thread_name_prefix="prepare")
        self.working = threading.Semaphore(working)
        self.waiting = threading.Semaphore(waiting)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs a call as soon as fewer than `working` work."""
        return super().submit(self._work, function, *args, **kwargs)

    def _work(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.working:
            _OWN.workers = self
            return function(*args, **kwargs)


@contextmanager
def outside() -> Iterator[None]:
    """Context in which the calling thread waits for something outside: meanwhile another one works in its place.

    Changes nothing for threads that are none of `Workers`.

    Raises:
        AllWaitError: as many threads wait already as may.
    """
    workers: Workers | None = getattr(_OWN, "workers", None)
    if workers is None:
        yield
        return
    if not workers.waiting.acquire(blocking=False):
        raise AllWaitError
    try:
        workers.working.release()
        try:
            yield
        finally:
            workers.working.acquire()
    finally:
        workers.waiting.release()
