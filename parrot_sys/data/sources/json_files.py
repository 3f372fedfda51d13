"""One file of records: a JSON list, or one JSON value a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.data.record_files import Encoding, check_exists, detect_encoding, parse_json, scan_records
from parrot_sys.data.sources.base import Advance, FileState, Place, RecordSource, ignore_progress
from parrot_sys.errors import DataError, StorageError, printable

_CHUNK = 1 << 22


class JsonRecords(RecordSource):
    """A place is the first byte of a record and the byte after its last."""

    NAME = "JSON"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._descriptor: int | None = None
        self._seen: FileState | None = None  # when the file was first asked for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    @classmethod
    def takes(cls, path: Path) -> bool:
        """Any file: lists and lines are told apart by their content."""
        return True

    def state(self) -> list[FileState]:
        """State of the file."""
        check_exists(self.path)
        try:
            state = _state(self.path, os.stat(self.path))
        except OSError as error:
            raise DataError(f"data set {printable(self.path)} cannot be read: {error.strerror}") from error
        self._seen = self._seen or state
        return [state]

    def digest(self, advance: Advance = ignore_progress) -> str:
        """SHA-256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()

    def scan(self, advance: Advance = ignore_progress) -> Iterator[Place]:
        """Places of all records."""
        before = 0
        for start, end, _ in scan_records(self.path):
            yield start, end
            advance(end - before)
            before = end

    def records(self, advance: Advance = ignore_progress) -> Iterator[Any]:
        """All raw records, in one pass."""
        for _, _, record in scan_records(self.path, _steps(advance)):
            yield record

    def read(self, places: Sequence[Place]) -> list[Any]:
        """Raw records of some places."""
        return [parse_json(self._encoding.decode(self._bytes(*place))) for place in places]

    def _bytes(self, start: int, end: int) -> bytes:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(f"data set {printable(self.path)} cannot be opened: {error.strerror}") from error
        state = _state(self.path, os.fstat(self._descriptor))
        if state != (self._seen or state):
            raise StorageError(
                f"data set {printable(self.path)} has changed since its index was read: start again, and the index is "
                "built anew"
            )
        return os.pread(self._descriptor, end - start, start)

    @cached_property
    def _encoding(self) -> Encoding:
        with self.path.open("rb") as file:
            return detect_encoding(file)


def _state(path: Path, status: os.stat_result) -> FileState:
    return path.name, status.st_size, status.st_mtime_ns


def _steps(advance: Advance) -> Callable[[int], None]:
    """Bytes read so far -> bytes since the last call."""
    before = 0

    def step(read: int) -> None:
        nonlocal before
        advance(read - before)
        before = read

    return step
