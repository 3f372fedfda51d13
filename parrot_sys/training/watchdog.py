"""Ends a process that makes no progress, after it has logged where its threads stand, so that torchrun can restart."""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from types import TracebackType

import psutil
import torch.distributed as dist

HUNG = 75
"""Exit code of a process that its watchdog ended. When not even the watchdog can run it is 1."""

_STDERR = 2
_PY_SPY_SECONDS = 30
_generation = 0


class Watchdog:
    """Context manager around work that calls `beat` at least every `timeout` seconds; every rank has one.

    A thread looks whether beats come. If they stop, every rank logs the stacks of its own threads, which works while
    the main thread waits in a collective, and the first one also names the ranks that stay silent: a stopped process
    cannot log anything itself. Should the thread not get to run (code that never releases the interpreter's lock), the
    timer of `faulthandler`, which needs no lock, writes the stacks and ends the process.
    """

    def __init__(self, timeout: float | None) -> None:
        """
        Args:
            timeout: seconds; None watches nothing.
        """
        self.timeout = timeout
        self._last, self._doing = time.monotonic(), "starting"
        self._stopped = threading.Event()

    def beat(self, doing: str) -> None:
        """Says that there is progress; `doing` is what comes next, for the log."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            global _generation
            _generation += 1
            self._peers = _Peers(f"watchdog/{_generation}")
            self.beat(self._doing)
            self._thread = threading.Thread(target=self._watch, args=(self.timeout,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.timeout is not None:
            self._stopped.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, timeout: float) -> None:
        interval = min(timeout / 4, 5.0)
        awake = time.monotonic()
        while True:
            # Armed anew as long as this thread runs.
            faulthandler.dump_traceback_later(timeout + interval, exit=True, file=_STDERR)
            if self._stopped.wait(interval):
                return
            before, awake = awake, time.monotonic()
            if awake - before > timeout / 2:
                self._last = awake  # the whole process was stopped: its main thread gets its time too
            elif awake - self._last > timeout:
                self._end(awake - self._last, grace=max(2 * interval, 1.0))

    def _end(self, silence: float, grace: float) -> None:
        rank = dist.get_rank()
        faulthandler.dump_traceback_later(grace + 2 * _PY_SPY_SECONDS, exit=True, file=_STDERR)  # should this get stuck
        try:
            _say(
                f"[rank {rank}] no progress for {silence:.0f} s while {self._doing} (pid {os.getpid()} on "
                f"{socket.gethostname()}). Stacks of all its threads, the current call first:\n{_stacks()}"
            )
            if silent := self._peers.report(grace):
                _say(f"[rank {rank}] " + "; ".join(silent))
            _say(f"[rank {rank}] ended by the watchdog (faults.hang_timeout={self.timeout:g}) with exit code {HUNG}")
        finally:
            os._exit(HUNG)


class _Peers:
    """What the ranks know of each other through the store that they met at; it works without any collective."""

    def __init__(self, prefix: str) -> None:
        # A connection of its own: the main thread may hang in a call of the other one and hold its lock.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # not in the stubs
        self._store = dist.distributed_c10d.PrefixStore(prefix, store)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._store.set(f"process/{self._rank}", f"{os.getpid()} {socket.gethostname()}")

    def report(self, grace: float) -> list[str]:
        """Tells the others that this rank hangs, waits `grace` seconds for their reports; who stays silent, and why."""
        self._store.set(f"hung/{self._rank}", "")
        end = time.monotonic() + grace
        while (silent := [r for r in range(self._size) if not self._store.check([f"hung/{r}"])]) and (
            time.monotonic() < end
        ):
            time.sleep(0.05)
        return [self._describe(rank) for rank in silent]

    def _describe(self, rank: int) -> str:
        if not self._store.check([f"process/{rank}"]):
            return f"rank {rank} has not come as far as its watchdog"
        pid, host = self._store.get(f"process/{rank}").decode().split(" ", 1)
        if host != socket.gethostname():
            return f"rank {rank} (pid {pid} on {host}) does not answer: look at that machine"
        try:
            status = psutil.Process(int(pid)).status()
        except psutil.NoSuchProcess:
            return f"rank {rank} (pid {pid}) is gone"
        text = f"rank {rank} (pid {pid}) does not answer, the operating system says it is {status}"
        if status == psutil.STATUS_STOPPED:
            text += "; a stopped process cannot log its own stack"
        return text + _foreign_stack(pid)


def _foreign_stack(pid: str) -> str:
    """The Python stack of another process if py-spy is installed."""
    if (py_spy := shutil.which("py-spy")) is None:
        return " (with py-spy installed its stack would stand here)"
    command = [py_spy, "dump", "--nonblocking", "--pid", pid]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f" (py-spy did not work: {error})"
    return f"; its stack by py-spy:\n{done.stdout or done.stderr}"


def _stacks() -> str:
    # By way of a file, so that they reach the log in one piece, between the lines of other ranks.
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _say(text: str) -> None:
    """Straight to the log: the lock of the logging module may be held by a thread that hangs."""
    os.write(_STDERR, (text.rstrip("\n") + "\n").encode())
