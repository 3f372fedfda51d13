"""Ranks that hang in three ways end with their stacks in the log; ranks that work do not."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training.config import FaultConfig
from parrot_sys.training.watchdog import HUNG, Watchdog


def _spin_for_ever() -> None:
    while True:
        pass


def _hold_the_interpreter() -> None:
    re.match("(a+)+$", "a" * 40 + "b")  # centuries of backtracking in C, without one chance for another thread


def _stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang(how: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Two ranks, of which the second hangs and the first waits for it; how they ended, and the log."""

    def work(rank: int, size: int) -> None:
        watchdog = Watchdog(FaultConfig(hang_timeout=1.0))
        watchdog.meet()
        with watchdog.section("steps", "training after step 7"):
            if rank == 1:
                how()
            dist.barrier()

    with pytest.raises(RuntimeError) as error:
        run_distributed(work, 2, timeout=30)
    return str(error.value), capfd.readouterr().err


def test_every_rank_logs_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    ends, log = _hang(_spin_for_ever, capfd)
    assert ends.count(f"exit code {HUNG}") == 2
    for rank, place in ((0, "in barrier"), (1, "in _spin_for_ever")):
        _, _, text = log.partition(f"[rank {rank}] no progress for ")
        stack, _, _ = text.partition("[rank ")
        assert "while training after step 7" in stack
        assert place in stack
    assert "does not answer" not in log


def test_a_stopped_rank_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    ends, log = _hang(_stop_myself, capfd)
    assert f"exit code {HUNG}" in ends
    assert "in barrier" in log
    assert re.search(r"\[rank 0\] rank 1 \(pid \d+\) does not answer, the operating system says it is stopped", log)
    assert "a stopped process cannot log its own stack" in log


def test_a_rank_that_holds_the_interpreter_logs_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    ends, log = _hang(_hold_the_interpreter, capfd)
    assert "exit code 1" in ends
    assert "Timeout (0:00:01" in log
    assert "in _hold_the_interpreter" in log


def test_progress_and_no_timeout_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    def work(rank: int, size: int) -> None:
        watchdog = Watchdog(FaultConfig(hang_timeout=0.6, checkpoint_timeout=None))
        watchdog.meet()
        with watchdog.section("steps", "training"):
            for _ in range(6):
                time.sleep(0.2)
                watchdog.beat("working")
            with watchdog.section("checkpoint", "saving"):
                time.sleep(0.8)  # not watched
            time.sleep(0.4)  # the time counts from the end of what stood inside
        time.sleep(0.8)  # nobody watches any more

    run_distributed(work, 2)
    assert "no progress" not in capfd.readouterr().err
