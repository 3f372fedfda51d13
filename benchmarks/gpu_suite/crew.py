"""Runs rows in worker processes under a time budget.

A kernel may hang, crash its process or spoil its CUDA context, and none of this may cost the rows after it: a worker
that fails a row, or whose peer raised, is replaced; one that takes too long, or is still running at the end of the
budget, is killed. Workers are forked, so this process must not touch CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.workload import Broke, Unavailable

Row = dict[str, Any]
Work = Callable[[str], Row]

_TRACEBACK = 4000  # characters of it that are kept
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def attempt(work: Work, name: str) -> Row:
    """The row that `work` makes: passed, unavailable with the reason, or failed with the error."""
    start = time.monotonic()
    try:
        row = {"status": "passed", **work(name)}
    except Unavailable as reason:
        row = {"status": "unavailable", "error": str(reason), "broke": isinstance(reason, Broke)}
    except Exception as error:
        text = "".join(traceback.format_exception(error))[-_TRACEBACK:]
        row = {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": text}
    return {**row, "seconds": round(time.monotonic() - start, 3)}


def _spoilt(row: Row) -> bool:
    """Whether the process that made it may be of no use any more."""
    return row["status"] == "failed" or row.get("broke", False)


def _serve(work: Work, connection: Connection) -> None:
    os.setsid()  # a group of its own, so that what it starts ends with it
    # When the suite is killed outright: a worker that went on would disturb the timings of the next run.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while (name := connection.recv()) is not None:
        row = attempt(work, name)
        connection.send(row)
        if _spoilt(row):
            return


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.row: str | None = None
        self.until = 0.0

    def give(self, row: str, until: float) -> None:
        self.connection.send(row)
        self.row, self.until = row, until

    def take(self) -> Row:
        """The row it sends, or that it died."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {"status": "failed", "error": f"its process ended with {how}"}

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()


def run_rows(
    rows: Sequence[str],
    work: Work,
    record: Callable[[str, Row], None],
    *,
    workers: int,
    seconds: float,
    row_seconds: float,
) -> dict[str, str]:
    """Works through `rows` for at most `seconds`.

    Args:
        rows: names, in the order in which they are begun.
        work: makes one row, in a worker; its exceptions become a failed row, Unavailable an unavailable one.
        record: called here with each finished row.
        workers: processes at a time.
        seconds: the budget; what has not finished by then is not run.
        row_seconds: a row that takes longer has failed.

    Returns:
        The rows that were not run, with the reason.
    """
    start = time.monotonic()
    deadline = start + seconds
    pending, crew = deque(rows), list[_Worker]()
    try:
        while (pending or any(worker.row for worker in crew)) and (now := time.monotonic()) < deadline:
            while pending and len(crew) < workers:
                crew.append(_Worker(work))
            for worker in crew:
                if worker.row is None and pending:
                    worker.give(pending.popleft(), now + row_seconds)
            crew = _progress(crew, record, deadline, row_seconds)
        cut = {worker.row: f"cut off at the end of the budget of {seconds:.3g} s" for worker in crew if worker.row}
    finally:
        for worker in crew:
            worker.stop()
    return cut | dict.fromkeys(pending, f"the budget of {seconds:.3g} s had ended")


def _progress(
    crew: list[_Worker], record: Callable[[str, Row], None], deadline: float, row_seconds: float
) -> list[_Worker]:
    """Waits until something happens; returns the workers that can go on."""
    busy = [worker for worker in crew if worker.row]
    until = min([deadline, *(worker.until for worker in busy)])
    ready = wait([worker.connection for worker in busy], max(0.0, until - time.monotonic()))
    for worker in busy:
        assert worker.row is not None
        if worker.connection in ready:
            row = worker.take()
        elif time.monotonic() >= worker.until:
            row = {"status": "failed", "error": f"took longer than {row_seconds:g} s", "seconds": row_seconds}
        else:
            continue
        record(worker.row, row)
        worker.row = None
        if _spoilt(row):
            worker.stop()
            crew = [other for other in crew if other is not worker]
    return crew
