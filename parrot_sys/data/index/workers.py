"""Processes that index blocks of records, each on one core.

They are programs of their own, not forks: a training process has threads and a CUDA context by then. A worker ends when
the process that started it is gone.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from parrot_sys.data.index.block import Indexer
from parrot_sys.data.index.columns import Array, write_part
from parrot_sys.errors import DataError, ParrotError

# (The other process finds modules where this one does, however they got on its path.)
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from parrot_sys.data.index.workers import main; main()"
)


class Workers:
    """A number of worker processes. `index` may be called from as many threads as there are processes."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in processes:
            self._idle.put(process)

    def index(self, places: Array, first: int, part: Path) -> None:
        """One worker writes the columns of some records to the file `part`, see `Indexer.columns`.

        Raises:
            ParrotError: what the worker raised, or that it has ended.
        """
        process = self._idle.get()
        try:
            try:
                _send(process.stdin, (places, first, part))
                problem = pickle.load(_open_pipe(process.stdout))
            except (OSError, EOFError, pickle.UnpicklingError):
                raise DataError(f"a process that indexes records {_ended(process)}; start again, it goes on") from None
        finally:
            self._idle.put(process)
        if problem is not None:
            raise problem


@contextmanager
def start_workers(indexer: Indexer, count: int) -> Iterator[Workers]:
    """`count` processes that work for an indexer until the end of the block."""
    from parrot_sys import platform  # (which imports torch: a worker needs none)

    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=platform.single_thread_environment(),
            )
            processes.append(process)
            _send(process.stdin, sys.path)
            _send(process.stdin, indexer)
        yield Workers(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def main() -> None:
    """A worker: takes blocks from standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started this one, which ends it
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    indexer: Indexer = pickle.load(requests)
    # (Records are trees, freed without the collector; it would look through those of a block again and again.)
    gc.freeze()
    gc.disable()
    while True:
        try:
            places, first, part = pickle.load(requests)
        except EOFError:
            return
        try:
            write_block(indexer, places, first, part)
        except ParrotError as error:
            _send(replies, error)
        except OSError as error:
            _send(replies, DataError(f"{part.parent} cannot be written: {error.strerror}"))
        else:
            _send(replies, None)
        gc.collect()


def write_block(indexer: Indexer, places: Array, first: int, part: Path) -> None:
    """Writes the columns of a block to `part`, and before that the pictures of its records beside it."""
    temporary = part.with_suffix(".pictures.tmp")
    temporary.unlink(missing_ok=True)
    columns = indexer.columns(places, first, temporary)
    if temporary.exists():
        temporary.replace(pictures_of(part))
    write_part(part, columns)


def pictures_of(part: Path) -> Path:
    """File for the pictures that the records of a part hold themselves."""
    return part.with_suffix(".pictures")


def _open_pipe(stream: Any) -> BinaryIO:
    assert stream is not None, "the process was started with a pipe"
    return stream


def _send(stream: Any, value: object) -> None:
    target = _open_pipe(stream)
    pickle.dump(value, target, protocol=pickle.HIGHEST_PROTOCOL)
    target.flush()


def _ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return f"was ended by signal {-code} (out of memory?)" if code < 0 else f"has ended with exit code {code}"
