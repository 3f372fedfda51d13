"""Building an index: blocks of records in several processes; a build that was killed goes on with the next block."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from parrot_sys import platform
from parrot_sys.data.index.block import Indexer, blocks_of
from parrot_sys.data.index.columns import Array, Columns, read_part, write_columns
from parrot_sys.data.index.merge import merge
from parrot_sys.data.index.record_index import HEADER, PICTURES, VERSION, pictures_size, plain_state
from parrot_sys.data.index.waiting import write_progress
from parrot_sys.data.index.workers import Workers, pictures_of, start_workers, write_block
from parrot_sys.errors import DataError
from parrot_sys.files import replace_text
from parrot_sys.staging import staged_directory

logger = logging.getLogger(__name__)
_BLOCK = 2048  # records in a part
_SMALL = 8  # blocks that this process indexes itself: others would take longer to start
_STATE = "build.json"
_REPORT_SECONDS = 0.5
_LOG_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """An index that is to be built."""

    indexer: Indexer
    folder: Path
    """Where it will be; the parts are kept beside it until then."""
    names: dict[str, str] = field(default_factory=dict)
    """Names of the tokenizer and the data set, for messages."""
    workers: int | None = None
    """Processes; None takes one a core."""

    @property
    def parts(self) -> Path:
        """Folder of what is done so far."""
        return self.folder.with_name(f".{self.folder.name}.parts")


def build_index(job: BuildJob, on_progress: Callable[[], None] = lambda: None) -> None:
    """Builds an index, which appears only when it is complete; what an interrupted build has done is not done again.

    Args:
        job: what to build, where.
        on_progress: called now and then while it is built.

    Raises:
        DataError: the data set cannot be read to its end, or has changed meanwhile.
    """
    source = job.indexer.source
    files = plain_state(source)
    state = {"version": VERSION, "settings": job.indexer.settings.plain(), "files": files, "block": _BLOCK}
    _prepare(job.parts, state)
    with ThreadPoolExecutor(1, "parrot-digest") as hashing:
        digest = hashing.submit(source.digest)
        count = _index_blocks(job, on_progress)
        header = state | {"digest": digest.result(), "records": count, "names": job.names}
    with staged_directory(job.folder) as folder:
        parts = [_part(job, number) for number in range(-(-count // _BLOCK))]
        columns = merge([_read(part) for part in parts], [pictures_of(part) for part in parts], folder / PICTURES)
        checksums = write_columns(folder, columns)
        if plain_state(source) != files:
            raise DataError(f"data set {source.path} has changed while it was indexed: start again")
        header |= {"columns": checksums, "pictures": pictures_size(folder)}
        replace_text(folder / HEADER, json.dumps(header) + "\n")
    shutil.rmtree(job.parts, ignore_errors=True)


def _prepare(parts: Path, state: dict[str, Any]) -> None:
    """An empty folder of parts, or one with parts of the same build."""
    try:
        known = json.loads((parts / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != state:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        replace_text(parts / _STATE, json.dumps(state) + "\n")


def _index_blocks(job: BuildJob, on_progress: Callable[[], None]) -> int:
    """Writes the parts that are missing; the number of records."""
    with _Progress(job, on_progress) as progress:
        blocks = enumerate(progress.counting(blocks_of(job.indexer.source.scan(progress.pass_bytes), _BLOCK)))
        small = list(islice(blocks, _SMALL + 1))
        if len(small) <= _SMALL:
            for number, places in small:
                if not _is_done(job, number, places):
                    write_block(job.indexer, places, number * _BLOCK, _part(job, number))
                progress.done(places)
            return progress.scanned
        count = job.workers or platform.cores()
        logger.info("indexing %s (%.1f MB) in %d processes", job.indexer.source.path, progress.size / 1e6, count)
        with start_workers(job.indexer, count) as workers, ThreadPoolExecutor(count, "parrot-index") as threads:
            waiting: list[tuple[Future[None], Array]] = []
            try:
                for number, places in chain(small, blocks):
                    waiting.append((threads.submit(_index_one, job, workers, number, places), places))
                    while waiting and waiting[0][0].done():
                        _take(waiting, progress)
                while waiting:
                    _take(waiting, progress)
            except BaseException:
                threads.shutdown(cancel_futures=True, wait=False)
                raise
        return progress.scanned


def _take(waiting: list[tuple[Future[None], Array]], progress: _Progress) -> None:
    future, places = waiting.pop(0)
    while True:
        with contextlib.suppress(TimeoutError):
            future.result(timeout=_REPORT_SECONDS)
            progress.done(places)
            return
        progress.report()


def _index_one(job: BuildJob, workers: Workers, number: int, places: Array) -> None:
    if not _is_done(job, number, places):
        workers.index(places, number * _BLOCK, _part(job, number))


def _part(job: BuildJob, number: int) -> Path:
    return job.parts / f"{number:06d}.npz"


def _is_done(job: BuildJob, number: int, places: Array) -> bool:
    """Whether a part is there, whole, and of these places."""
    part = read_part(_part(job, number))
    return part is not None and part["places"].shape == places.shape and bool((part["places"] == places).all())


def _read(part: Path) -> Columns:
    columns = read_part(part)
    if columns is None:
        raise DataError(f"{part} is damaged: start again, and it is made anew")
    return columns


class _Progress:
    """Counts records, in a bar and in a file that waiting processes read."""

    def __init__(self, job: BuildJob, on_progress: Callable[[], None]) -> None:
        self._parts, self._source, self._on_progress = job.parts, job.indexer.source, on_progress
        self.scanned = 0
        self.size = self._source.size()
        self._done, self._bytes = 0, 0
        self._last = self._logged = time.monotonic()
        self._bar = tqdm(
            desc=f"index {self._source.path.name}",
            unit=" records",
            unit_scale=True,
            delay=1,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def pass_bytes(self, count: int) -> None:
        """Bytes of the data set that were scanned."""
        self._bytes += count
        self.report()

    def counting(self, blocks: Iterator[Array]) -> Iterator[Array]:
        """The blocks, whose records are counted as they come."""
        for places in blocks:
            self.scanned += len(places)
            yield places

    def done(self, places: Array) -> None:
        """Records that are indexed now."""
        self._done += len(places)
        self._bar.update(len(places))
        self.report()

    def report(self) -> None:
        """Tells whoever waits, not too often."""
        if (now := time.monotonic()) - self._last < _REPORT_SECONDS:
            return
        self._last = now
        # (How many records there are is known at the end of the scan: until then it is an estimate.)
        total = max(self.scanned, int(self.scanned * self.size / max(self._bytes, 1)))
        write_progress(self._parts, self._done, total)
        if not self._bar.disable:
            self._bar.total = total
        elif now - self._logged > _LOG_SECONDS:
            self._logged = now
            logger.info("index %s: %s of about %s records", self._source.path.name, f"{self._done:,}", f"{total:,}")
        self._on_progress()
