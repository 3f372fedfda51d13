"""Ends a process that makes no progress, after it has logged where its threads are, so that torchrun can restart."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch.distributed as dist

from parrot_sys import platform
from parrot_sys.training.config import FaultConfig

HUNG = 75
"""Exit code of a process that its watchdog ended. When not even the watchdog can run it is 1."""

SectionName = Literal["setup", "features", "steps", "checkpoint", "export"]
_SETTINGS: dict[SectionName, str] = {
    "setup": "setup_timeout",
    "features": "features_timeout",
    "steps": "hang_timeout",
    "checkpoint": "checkpoint_timeout",
    "export": "export_timeout",
}
_STDERR = 2
_INTERVAL = 5.0
_PY_SPY_SECONDS = 30
_generation = 0


@dataclass(frozen=True, slots=True)
class _Section:
    """The work that a process is in the middle of."""

    setting: str
    """Field of FaultConfig that says how long it may be silent."""
    timeout: float | None
    doing: str


class Watchdog:
    """Watches the sections of a run, in each of which `beat` must be called at least every so many seconds.

    Every rank has one. A thread looks whether beats come. If they stop, every rank logs the stacks of its own threads,
    which works while the main thread waits in a collective, and the first one also names the ranks that stay silent: a
    stopped process cannot log anything itself. Should the thread not get to run (code that never releases the
    interpreter's lock), the timer of `faulthandler`, which needs no lock, writes the stacks and ends the process.
    """

    def __init__(self, config: FaultConfig) -> None:
        """
        Args:
            config: seconds for each section; None does not watch it.
        """
        self._config = config
        self._sections: list[_Section] = []
        self._last = time.monotonic()
        self._peers: _Peers | None = None
        # Set when another section begins, and with it another time.
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def meet(self) -> None:
        """Tells the other ranks of this process; all ranks call it once their process groups are there."""
        global _generation
        _generation += 1
        self._peers = _Peers(f"watchdog/{_generation}")

    def beat(self, doing: str | None = None) -> None:
        """Says that there is progress; `doing` is what comes next, for the log."""
        if self._sections and doing is not None:
            self._sections[-1] = replace(self._sections[-1], doing=doing)
        self._last = time.monotonic()

    @contextlib.contextmanager
    def section(self, name: SectionName, doing: str) -> Iterator[None]:
        """Watches the block, with the time of this section; one inside another has its own time.

        Args:
            name: of the section.
            doing: what comes first, for the log.
        """
        setting = _SETTINGS[name]
        self._enter([*self._sections, _Section(setting, getattr(self._config, setting), doing)])
        try:
            yield
        finally:
            self._enter(self._sections[:-1])

    def judge(self, silence: float, doing: str) -> None:
        """Ends the process if work in the background was silent for longer than the section allows.

        Args:
            silence: seconds without progress.
            doing: what is silent, for the log.
        """
        section = replace(self._sections[-1], doing=doing)
        if section.timeout is not None and silence > section.timeout:
            self._end(section, silence, grace=2.0)

    def _enter(self, sections: list[_Section]) -> None:
        self._last, self._sections = time.monotonic(), sections
        self._changed.set()
        if sections and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        elif not sections and self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        awake = time.monotonic()
        while sections := self._sections:
            section = sections[-1]
            interval = _INTERVAL if section.timeout is None else min(section.timeout / 4, _INTERVAL)
            # Armed anew as long as this thread runs.
            if section.timeout is None:
                faulthandler.cancel_dump_traceback_later()
            else:
                faulthandler.dump_traceback_later(section.timeout + interval, exit=True, file=_STDERR)
            self._changed.wait(interval)
            self._changed.clear()
            before, awake = awake, time.monotonic()
            if section.timeout is None or self._sections is not sections:
                continue
            if awake - before > interval + section.timeout / 2:
                self._last = awake  # the whole process was stopped: its main thread gets its time too
            elif awake - self._last > section.timeout:
                self._end(self._sections[-1], awake - self._last, grace=max(2 * interval, 1.0))

    def _end(self, section: _Section, silence: float, grace: float) -> None:
        rank = _rank()
        faulthandler.dump_traceback_later(grace + 2 * _PY_SPY_SECONDS, exit=True, file=_STDERR)  # should this get stuck
        try:
            _say(
                f"[rank {rank}] no progress for {silence:.0f} s while {section.doing} (pid {os.getpid()} on "
                f"{socket.gethostname()}). Stacks of all its threads, the current call first:\n{_stacks()}"
            )
            if self._peers is not None and (silent := self._peers.report(grace)):
                _say(f"[rank {rank}] " + "; ".join(silent))
            _say(
                f"[rank {rank}] ended by the watchdog (faults.{section.setting}={section.timeout:g}) with exit code "
                f"{HUNG}"
            )
        finally:
            os._exit(HUNG)


def _rank() -> int:
    """The rank of this process, also before there are process groups."""
    return dist.get_rank() if dist.is_initialized() else platform.launch().rank


class _Peers:
    """Knowledge of the ranks about each other through the store that they met at; it works without any collective."""

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
        return " (with py-spy installed its stack would be here)"
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
