"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import psutil


class Memory:
    """Peak of the memory of any process below one, looked at a few times a second."""

    def __init__(self, pid: int, kind: str = r"Private_\w+") -> None:
        """
        Args:
            pid: the process.
            kind: of memory, as /proc/PID/smaps_rollup names it: `Private_...` of the process with most of it, or `Pss`
                (a share of what several processes have) of all of them together.
        """
        self._pid, self._kind, self._ended = pid, kind, threading.Event()
        self.peak_mb = 0.0
        self.seen: set[int] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            try:
                root = psutil.Process(self._pid)
                pids = [process.pid for process in [root, *root.children(recursive=True)]]
            except psutil.Error:
                continue
            self.seen.update(pids)
            found = [memory_mb(pid, self._kind) for pid in pids]
            self.peak_mb = max(self.peak_mb, sum(found) if self._kind == "Pss" else max(found))


def memory_mb(pid: int, kind: str) -> float:
    """Memory of a process, see `Memory`; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(size) for size in re.findall(rf"^{kind}: +(\d+) kB", text, re.MULTILINE)) / 1000


def private_mb(pid: int) -> float:
    """Memory of a process that no other one shares."""
    return memory_mb(pid, r"Private_\w+")
