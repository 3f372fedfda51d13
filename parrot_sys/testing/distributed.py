"""Runs a function on several ranks, in processes of this machine, and brings back what each rank returned."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Once a rank has failed, its peers wait in collectives for nothing; this is their time to report an error of their own.
_GRACE_SECONDS = 3.0


def run_distributed(
    fn: Callable[..., T], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 60.0
) -> list[T]:
    """Calls `fn(rank, world_size, *args)` on every rank of a fresh process group.

    gloo ranks are forked (0.1 s; `fn` may be a closure), which needs a parent without a CUDA context. nccl ranks are
    spawned, one device each, and `fn` must be importable. Ranks meet through a file, so no port is taken.

    Args:
        fn: what to run; its result must pickle.
        world_size: number of ranks.
        *args: further arguments of `fn`.
        backend: `gloo` (CPU) or `nccl` (GPU).
        timeout: seconds until all ranks must be done; what is left is killed.

    Returns:
        The results by rank.

    Raises:
        RuntimeError: a rank raised, died or ran into the time-out; holds every rank's traceback.
    """
    context: Any = multiprocessing.get_context("spawn" if backend == "nccl" else "fork")
    with tempfile.TemporaryDirectory(prefix="parrot_ranks_") as folder:
        processes: list[BaseProcess] = []
        readers: list[Connection] = []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            job = (rank, world_size, backend, timeout, folder, writer, fn, args)
            process = context.Process(target=_run_rank, args=job, name=f"rank{rank}")
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        try:
            reports = _collect(readers, time.monotonic() + timeout)
        finally:
            notes = _stop(processes, Path(folder))
    failures = [
        f"--- rank {rank} ---\n{report or 'no result: ' + notes.get(rank, '')}"
        for rank, report in enumerate(reports)
        if not isinstance(report, _Success)
    ]
    if failures:
        head = f"{len(failures)} of {world_size} ranks failed (timeout {timeout:g} s)"
        raise RuntimeError("\n".join([head, *failures]))
    return [report.value for report in reports if isinstance(report, _Success)]


class _Success:
    """Result of a rank that came to its end."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _run_rank(
    rank: int,
    world_size: int,
    backend: str,
    timeout: float,
    folder: str,
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    with open(os.path.join(folder, f"stack{rank}"), "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        # What the parent left behind is not this process's to destroy: threads that process groups wait for in the end
        # exist only there.
        gc.freeze()
        # More threads than cores only slow the ranks down, and a forked OpenMP pool must not be used again.
        torch.set_num_threads(1)
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                backend,
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            # Plain pickle: torch's own reducers would share memory that is gone when this process ends.
            report: bytes = pickle.dumps(_Success(fn(rank, world_size, *args)))
            dist.destroy_process_group()
        except BaseException:  # whatever ended the rank is what the caller has to see
            report = pickle.dumps(traceback.format_exc())
        writer.send_bytes(report)
        writer.close()


def _collect(readers: list[Connection], deadline: float) -> list[_Success | str | None]:
    """Reports of all ranks; None for one that died or was late. A failure shortens the wait for the others."""
    reports: list[_Success | str | None] = [None] * len(readers)
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(waiting), timeout=left):
            assert isinstance(reader, Connection), "only pipes are waited for"
            rank = waiting.pop(reader)
            try:
                reports[rank] = pickle.loads(reader.recv_bytes())
            except EOFError:
                reports[rank] = None
            if not isinstance(reports[rank], _Success):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return reports


def _stop(processes: list[BaseProcess], folder: Path) -> dict[int, str]:
    """Ends every process; returns where those that still ran were, or how those that died ended."""
    notes = {}
    for rank, process in enumerate(processes):
        process.join(timeout=0.5)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.1)  # the handler writes the stack asynchronously
            process.kill()
            process.join()
            notes[rank] = f"it was still running here\n{(folder / f'stack{rank}').read_text()}"
        elif process.exitcode:
            notes[rank] = f"the process ended with exit code {process.exitcode}"
    return notes
