"""One process builds an index at a time; the others wait and say how far it has come."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parrot_sys.files import replace_text

logger = logging.getLogger(__name__)
_PROGRESS = "progress.json"
_POLL_SECONDS = 0.2
_SAY_SECONDS = 10.0


@contextlib.contextmanager
def only_builder(path: Path, parts: Path, on_progress: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process builds the index of a path, and keeps others from it during the block.

    The lock ends with the process, however that ends. Where files cannot be locked, two processes may build the same at
    once: both write the same parts, each of them whole.

    Args:
        path: of the index.
        parts: folder where the process that builds it writes how far it is.
        on_progress: called now and then while this process waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        said: float | None = None
        while not _locked(file.fileno(), path):
            if said is None or time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                logger.info("waiting for the index %s: %s", path, read_progress(parts))
            on_progress()
            time.sleep(_POLL_SECONDS)
        yield


def _locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s cannot be locked (%s): several processes may build it", path, error.strerror)
    return True


def write_progress(parts: Path, done: int, total: int) -> None:
    """Says how far this process is; a disk that does not take it does not matter."""
    values = {"process": os.getpid(), "host": socket.gethostname(), "done": done, "total": total}
    with contextlib.suppress(OSError):
        replace_text(parts / _PROGRESS, json.dumps(values))


def read_progress(parts: Path) -> str:
    """How far the process is that builds an index, in words."""
    try:
        values = json.loads((parts / _PROGRESS).read_text(encoding="utf-8"))
        done, total = int(values["done"]), max(int(values["total"]), 1)
        return (
            f"process {values['process']} on host {values['host']} has indexed {done:,} of about {total:,} records "
            f"({done / total:.0%})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process builds it"
