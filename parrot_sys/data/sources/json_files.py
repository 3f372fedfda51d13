"""One file of records: a JSON list, or one JSON value a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

from parrot_sys.data.record_files import (
    LINE_SUFFIXES,
    Encoding,
    check_exists,
    detect_encoding,
    parse_json,
    scan_records,
)
from parrot_sys.data.sources.base import Advance, FileState, Place, RecordSource, ignore_progress
from parrot_sys.data.sources.files import list_files
from parrot_sys.errors import DataError, StorageError, printable

_CHUNK = 1 << 22


class JsonRecords(RecordSource):
    """A place is the first byte of a record and the byte after its last."""

    NAME = "JSON"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: FileIO | None = None  # (closed with the last reference)
        self._seen: FileState | None = None  # when the file was first asked for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

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

    def shards(self) -> list[RecordSource]:
        """The file; all record files of a folder, or that a pattern matches, which only streams read."""
        if self.path.is_file():
            return [self]
        return [JsonRecords(path) for path in list_files(self.path, (".json", *LINE_SUFFIXES))]

    def _bytes(self, start: int, end: int) -> bytes:
        if self._file is None:
            try:
                self._file = FileIO(self.path)
            except OSError as error:
                raise StorageError(f"data set {printable(self.path)} cannot be opened: {error.strerror}") from error
        descriptor = self._file.fileno()
        state = _state(self.path, os.fstat(descriptor))
        if state != (self._seen or state):
            raise StorageError(
                f"data set {printable(self.path)} has changed since its index was read: start again, and the index is "
                "built anew"
            )
        return os.pread(descriptor, end - start, start)

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
