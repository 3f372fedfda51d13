"""Workers under a time budget: what fails, hangs or crashes costs its own row and no other."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from benchmarks.gpu_suite.crew import Row, run_rows
from benchmarks.workload import Broke, Unavailable


def work(name: str) -> Row:
    """Behaves as its name says."""
    if name.startswith("raises"):
        raise ValueError("wrong by a mile")
    if name.startswith("breaks"):
        raise Broke("RuntimeError: an illegal memory access was encountered")
    if name.startswith("absent"):
        raise Unavailable("no such tool")
    if name.startswith("crashes"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("exits"):
        os._exit(7)
    if name.startswith("sleeps"):
        time.sleep(60)
    return {"process": os.getpid()}


def run(rows: list[str], **options: Any) -> tuple[dict[str, Row], dict[str, str]]:
    found: dict[str, Row] = {}
    settings = {"workers": 1, "seconds": 30.0, "row_seconds": 30.0} | options
    return found, run_rows(rows, work, found.__setitem__, **settings)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_row_costs_only_itself(workers: int) -> None:
    names = ["fine_1", "raises", "fine_2", "crashes", "exits", "absent", "fine_3"]
    found, not_run = run(names, workers=workers)
    assert not not_run
    assert {name: row["status"] for name, row in found.items()} == {
        **dict.fromkeys(["fine_1", "fine_2", "fine_3"], "passed"),
        **dict.fromkeys(["raises", "crashes", "exits"], "failed"),
        "absent": "unavailable",
    }
    assert found["raises"]["error"] == "ValueError: wrong by a mile"
    assert "raise ValueError" in found["raises"]["traceback"]
    assert found["crashes"]["error"] == "its process ended with SIGKILL"
    assert found["exits"]["error"] == "its process ended with exit code 7"
    assert found["absent"]["error"] == "no such tool"


@pytest.mark.parametrize("bad", ["raises", "breaks"])
def test_a_worker_whose_gpu_may_be_spoilt_is_replaced(bad: str) -> None:
    found, _ = run(["fine_1", "absent", "fine_2", bad, "fine_3"])
    assert found["fine_1"]["process"] == found["fine_2"]["process"] != found["fine_3"]["process"]
    assert found[bad]["status"] == ("failed" if bad == "raises" else "unavailable")


def test_a_row_that_hangs_fails_at_its_limit() -> None:
    start = time.monotonic()
    found, not_run = run(["sleeps", "fine"], row_seconds=0.5)
    assert time.monotonic() - start < 20
    assert (found["sleeps"]["status"], found["fine"]["status"]) == ("failed", "passed")
    assert found["sleeps"]["error"] == "took longer than 0.5 s"
    assert not not_run


def test_what_the_budget_cuts_off_is_not_run() -> None:
    found, not_run = run(["fine", "sleeps_1", "sleeps_2"], seconds=1.0)
    assert list(found) == ["fine"]
    assert not_run == {
        "sleeps_1": "cut off at the end of the budget of 1 s",
        "sleeps_2": "the budget of 1 s had ended",
    }


def test_no_budget_runs_nothing() -> None:
    assert run(["fine"], seconds=0.0) == ({}, {"fine": "the budget of 0 s had ended"})
