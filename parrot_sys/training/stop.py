"""SIGTERM and Ctrl-C during a run: the first asks it to save and end, a second Ctrl-C ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from parrot_sys.processes import EXIT_INTERRUPTED

_ASKING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager around steps that look at `received` after each; to be entered in the main thread.

    Python runs signal handlers in the main thread, which may wait in a collective for ever. So a second Ctrl-C is seen
    by a thread, which the interpreter's own handler wakes through a pipe.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal that asked this process to stop."""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="parrot-signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> Any:
        first = self.received is None
        self.received = signal.Signals(number)
        if first and number == signal.SIGINT and dist.get_rank() == 0:
            _say("Ctrl-C: this step is finished and a checkpoint saved; press it again to end at once")

    def _watch(self) -> None:
        interrupts = 0
        while numbers := os.read(self._reader, 64):
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                _say("ended by a second Ctrl-C; the last checkpoint is as it was")
                os._exit(EXIT_INTERRUPTED)
        os.close(self._reader)


def _say(text: str) -> None:
    """Past the logging module, whose lock the interrupted code may hold."""
    os.write(2, f"\n{text}\n".encode())
