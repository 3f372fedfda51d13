"""Programs that start others: signals that reach the one reach the other, and none outlives the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells give it."""
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """This program was asked to stop; ends it with the exit code that shells give for the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.code = 128 + number


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """From now on this process gets a signal when the one that started it ends, however that ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def run_program(arguments: Sequence[str]) -> int:
    """Runs a program with its output on this terminal; its exit code.

    It gets what asks this process to stop (Ctrl-C, SIGTERM, a closed terminal), once: a terminal sends Ctrl-C to its
    own session only, which the program leaves. A second Ctrl-C ends it and all that it has started at once.

    Raises:
        Stopped: this process was asked to stop; the program has ended.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None:
            _ask(process, asked)

    with _handled(pass_on):
        process = subprocess.Popen(arguments, start_new_session=True, preexec_fn=end_with_parent)
        if asked:
            _ask(process, asked)
        code = process.wait()
    if asked:
        raise Stopped(f"stopped by {signal.Signals(asked[0]).name}", asked[0])
    return code


def _ask(process: subprocess.Popen[bytes], asked: Sequence[int]) -> None:
    if len(asked) == 1:
        process.send_signal(asked[0])
    elif asked[-1] == signal.SIGINT:
        _kill_all(process.pid)


def _kill_all(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for each in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _ASKING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
