"""One checkpoint on its way to disk: Megatron plans it, a thread of each rank writes it, rank 0 completes it.

Megatron's own ways to write were left for three reasons: forked writers hang the run when one is killed, several of its
steps fail on one rank only (a full disk) while the others wait in a collective, and it takes the snapshot by forking.
"""

from __future__ import annotations

import io
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from parrot_sys import platform
from parrot_sys.errors import CheckpointWriteError
from parrot_sys.megatron.checkpoint.checksums import Digest, digest_file, write_checksums
from parrot_sys.megatron.checkpoint.shares import cut_for_shares
from parrot_sys.megatron.runtime.compat import catch_common_state, plan_save
from parrot_sys.parallel.agreement import gather_everywhere, on_first_rank

_POLL_SECONDS = 0.02


class CheckpointWrite:
    """A checkpoint that is being written; every rank makes one and calls the same methods in the same order."""

    def __init__(self, folder: Path, state: dict[str, Any], *, copy: bool) -> None:
        """Plans the write and starts a thread that does it.

        Args:
            folder: existing and empty, seen by every rank.
            state: sharded state dict; of what data-parallel ranks hold in common, each writes its share.
            copy: write from a copy in host memory; otherwise `state` must not change until the writer is done.
        """
        self.folder = folder
        self._error: str | None = None
        self._digests: dict[str, Digest] = {}
        self._plan = _Strategy()
        sharing = parallel_state.get_data_parallel_group(with_context_parallel=True)
        cut_for_shares(state, sharing)
        with catch_common_state() as common:
            request = plan_save(state, folder, FullyParallelSaveStrategyWrapper(self._plan, sharing))
        buckets = request.preload_fn() if request.preload_fn is not None else []
        if copy:
            buckets = _copied(buckets, self._plan.writer.write_buckets)
        files = {name: _serialized(values) for name, values in common.items()} if dist.get_rank() == 0 else {}
        self._results: list[Any] = []
        self._seen, self._moved = -1, time.monotonic()
        self._paths = [Path(bucket[0]) for bucket in buckets] + [folder / name for name in files]
        # A daemon: a run that fails must not wait for a checkpoint that nobody completes.
        self._thread = threading.Thread(target=self._write, args=(buckets, files), name="parrot-save", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether the writers of all ranks have come to their end, well or not. A collective."""
        writing, written = self._progress()
        if written != self._seen:
            self._seen, self._moved = written, time.monotonic()
        return writing == 0

    @property
    def silent_seconds(self) -> float:
        """Time since `is_done` last saw that some rank had written something."""
        return time.monotonic() - self._moved

    def wait(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Until `is_done`.

        Args:
            on_progress: called whenever some rank has written something; a writer that hangs does not call it.
        """
        last = -1
        while (state := self._progress())[0]:
            if state[1] != last:
                last = state[1]
                on_progress()
            time.sleep(_POLL_SECONDS)

    def complete(self, add_files: Callable[[], None] = lambda: None) -> None:
        """Writes what makes the parts of all ranks one checkpoint, its checksums last.

        Args:
            add_files: puts further files into the folder; called on rank 0.

        Raises:
            CheckpointWriteError: a rank could not write; on every rank. The folder is gone then.
        """
        self._thread.join()
        outcomes = gather_everywhere((self._error, self._results, self._digests))
        errors = [f"rank {rank}: {error}" for rank, (error, *_) in enumerate(outcomes) if error]

        def finish() -> None:
            if errors:
                raise CheckpointWriteError("; ".join(errors))
            self._plan.writer.finish(self._plan.metadata, [result for _, result, _ in outcomes])
            save_config(CheckpointingConfig(self._plan.backend, self._plan.version), str(self.folder))
            add_files()
            write_checksums(self.folder, {name: digest for *_, known in outcomes for name, digest in known.items()})

        on_first_rank(lambda: guarded_write(self.folder, finish))

    def _write(self, buckets: list[Any], files: dict[str, bytes]) -> None:
        """Runs in the thread: no collectives here. An error waits for `complete`."""
        try:
            for name, content in files.items():
                (self.folder / name).write_bytes(content)
            for bucket in buckets:
                self._results += _write_bucket(bucket, _transforms(self._plan.writer))
            # Hashed from the page cache; also waits until the disk has the bytes.
            for path in self._paths:
                self._digests[path.name] = digest_file(path, sync=True)
        except Exception as error:  # every failure has to reach the other ranks
            self._error = describe(error)
            # Its frames hold buffers in reference cycles; Python 3.12.1 crashes when it collects those.
            traceback.clear_frames(error.__traceback__)

    def _progress(self) -> tuple[int, int]:
        """(ranks that still write, bytes written by all)."""
        written = sum(path.stat().st_size for path in self._paths if path.exists()) + len(self._digests)
        state = torch.tensor([self._thread.is_alive(), written], dtype=torch.int64, device=platform.device())
        dist.all_reduce(state)
        ranks, total = state.tolist()
        return ranks, total


def guarded_write(folder: Path, action: Callable[[], None]) -> None:
    """Runs `action`; when it fails, `folder` is removed, which also gives its space back.

    Raises:
        CheckpointWriteError: says why, and how much space there is.
    """
    try:
        action()
    except Exception as error:  # a checkpoint that cannot be written must not end the training that it is to save
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointWriteError(
            f"{folder.name.lstrip('.')} could not be written: {describe(error)} ({free / 1e9:.3g} GB are free below "
            f"{folder.parent})"
        ) from error


def describe(error: Exception) -> str:
    """One line with the operating system's words where there are some."""
    if isinstance(error, CheckpointWriteError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's plan of a save, with the two things in reach that only its own completion gets otherwise."""

    writer: Any
    metadata: Any

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *args: Any) -> Any:
        self.writer, self.metadata, *_ = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *args)


def _transforms(writer: Any) -> list[Any]:
    return [writer.transforms] if hasattr(writer, "transforms") else []


def _write_bucket(bucket: Any, transforms: list[Any]) -> list[Any]:
    """Writes one file; the places of its tensors in it."""
    results: queue.Queue[Any] = queue.Queue()
    tickets: queue.Queue[int] = queue.Queue()
    tickets.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, tickets, use_fsync=False)
    _, outcome = results.get_nowait()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _copied(buckets: list[Any], planned: list[Any]) -> list[Any]:
    """Buckets without tensors that the next step changes: copies of host tensors; GPU tensors have one."""
    result = []
    for (path, key, (objects, tensors)), (*_, (_, live)) in zip(buckets, planned, strict=True):
        pairs = zip(tensors, live, strict=True)
        result.append((path, key, (objects, [(item, t.clone() if t is old else t) for (item, t), (_, old) in pairs])))
    return result


def _serialized(values: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()
