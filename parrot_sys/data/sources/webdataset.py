"""WebDataset shards: tar files in which the members of a sample follow each other and share a name up to its first dot.

The record of a sample is its `.json`, and its pictures are those of its members unless the record names some. A file
of columns (`columns.py`) makes records of other samples; columns are the endings: `txt`, `json.caption`, `jpg`.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.data.image_sources.archive import ArchiveSet
from parrot_sys.data.image_sources.tar import TarArchive
from parrot_sys.data.layouts import IMAGE_FIELDS
from parrot_sys.data.remote.file import LocalFile
from parrot_sys.data.sources.base import Advance, FileState, Place, RecordSource, ignore_progress
from parrot_sys.data.sources.columns import plain_turns
from parrot_sys.data.sources.files import changed, file_states, has_files, list_files
from parrot_sys.errors import DataError, StorageError, printable

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "jp2", "avif", "ppm")
_TEXTS = ("json", "jsonl", "txt", "text", "cls", "cap", "caption", "transcript", "id", "lang")
_LARGEST_TEXT = 64 << 20
_SHARD = 40  # bits of a place that count bytes in a shard


class WebDatasetRecords(RecordSource):
    """A place is the number of the shard with the first byte of the sample, and the byte after its last."""

    NAME = "WebDataset"

    def __init__(self, path: Path, *, as_rows: bool = False, shard: Path | None = None) -> None:
        """
        Args:
            path: the data set.
            as_rows: give samples by the endings of their members, for a file of columns.
            shard: the only one of its shards to read.
        """
        super().__init__(path)
        self._as_rows, self._shard = as_rows, shard

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_as_rows": self._as_rows, "_shard": self._shard}

    def rows(self) -> RecordSource:
        """The same samples by the endings of their members."""
        return type(self)(self.path, as_rows=True, shard=self._shard)

    def shards(self) -> list[RecordSource]:
        """Each shard."""
        return [type(self)(self.path, as_rows=self._as_rows, shard=path) for path in self.files()]

    @classmethod
    def takes(cls, path: Path) -> bool:
        """A tar, a pattern of them, or a folder that has some."""
        return has_files(path, TarArchive.ENDINGS)

    def files(self) -> list[Path]:
        """The shards that are read, in their order."""
        return self.all_files() if self._shard is None else [self._shard]

    def all_files(self) -> list[Path]:
        """The shards of the data set, in their order."""
        return list_files(self.path, TarArchive.ENDINGS)

    def state(self) -> list[FileState]:
        """States of the shards."""
        return file_states(self.files(), self.path)

    def digest(self, advance: Advance = ignore_progress) -> str:
        """SHA-256 of all names and of the members that are texts; of pictures only names count, as in a folder."""
        digest = hashlib.sha256()
        for tar in self._shards:
            with tar.file.open() as file:
                for info, _ in tar.headers(advance):
                    digest.update(repr((info.name, info.size)).encode("utf-8", "surrogateescape"))
                    if info.isfile() and _is_text(info.name):
                        file.seek(info.offset_data)
                        digest.update(file.read(min(info.size, _LARGEST_TEXT)))
        return digest.hexdigest()

    def scan(self, advance: Advance = ignore_progress) -> Iterator[Place]:
        """Places of all samples; only headers are read."""
        for number, tar in enumerate(self._shards):
            for key, start, end in self._samples(tar, advance):
                if self.is_wanted(Path(tar.file.name), key):
                    yield number << _SHARD | start, end

    def read(self, places: Sequence[Place]) -> list[Any]:
        """Records of some samples."""
        return [self._record(first >> _SHARD, first & (1 << _SHARD) - 1, end) for first, end in places]

    def pictures(self) -> ArchiveSet:
        """The members of all shards; each has its offset in an index beside its shard."""
        return self._pictures

    def _record(self, number: int, start: int, end: int) -> Any:
        try:
            members = dict(self._members(number, start, end))
            names = {name: f"{self._labels[number]}/{name}" for name, data in members.items() if data is None}
            row = _row(members, names)
            return row if self._as_rows else self.record(row, names)
        except StorageError:
            raise
        except DataError as error:
            return error

    def is_wanted(self, shard: Path, key: str) -> bool:
        """Whether a sample belongs to the data set."""
        return True

    def record(self, row: Mapping[str, Any], names: Mapping[str, str]) -> Any:
        """The raw record of a sample: its JSON; its pictures are those that the JSON names, else all of the sample.

        Args:
            row: the sample by the endings of its members.
            names: member -> name of a picture, for members that are no texts.
        """
        inner = row.get("json")
        if not isinstance(inner, Mapping):
            return DataError("has no .json with a record; say in a file of columns how its members become one")
        record = {"id": row["__key__"], **plain_turns(inner)}
        own = {short: full for name, full in names.items() for short in (name, posixpath.basename(name))}
        if all(record.get(field) is None for field in IMAGE_FIELDS):
            record["image"] = [full for name, full in names.items() if _is_picture(name)]
        for field in IMAGE_FIELDS:
            value = record.get(field)
            if isinstance(value, str):
                record[field] = own.get(value, value)
            elif isinstance(value, list):
                record[field] = [own.get(each, each) if isinstance(each, str) else each for each in value]
        return record

    def _samples(self, tar: TarArchive, advance: Advance) -> Iterator[tuple[str, int, int]]:
        """(key, first byte, byte after the last) of each sample."""
        start = position = 0
        before: str | None = None
        for info, end in tar.headers(advance):
            key = _split(info.name)[0] if info.isfile() else before
            if key != before:
                if before is not None:
                    yield before, start, position
                start = position
            before, position = key, end
        if before is not None:
            yield before, start, position

    def _members(self, number: int, start: int, end: int) -> Iterator[tuple[str, bytes | None]]:
        """(name, content) of the members of a sample; no content for those that are no texts."""
        shard = self._shards[number]
        with shard.file.section(start, end - start) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (info := tar.next()) is not None:
                        if not info.isfile():
                            continue
                        if not _is_text(info.name):
                            yield info.name, None
                            continue
                        if info.size > _LARGEST_TEXT:
                            raise DataError(f"{printable(info.name)} has {info.size} bytes, which is no text")
                        content = tar.extractfile(info)
                        yield info.name, b"" if content is None else content.read()
            except (tarfile.TarError, OSError) as error:
                raise changed(Path(shard.file.name)) from error

    @cached_property
    def _shards(self) -> list[TarArchive]:
        shards = []
        for path in self.files():
            try:
                shards.append(TarArchive(LocalFile(path)))
            except DataError as error:
                raise DataError(f"data set {printable(path)} {error}") from None
        return shards

    @cached_property
    def _labels(self) -> list[str]:
        """How names say which shard they mean."""
        base = os.path.commonpath([path.parent for path in self.files()])
        return [path.relative_to(base).as_posix() for path in self.files()]

    @cached_property
    def _pictures(self) -> ArchiveSet:
        return ArchiveSet(self.path, self._shards)


def _split(name: str) -> tuple[str, str]:
    """(key, ending in lower case) of a member: the name up to the first dot of its last part, and the rest."""
    folder, file = posixpath.split(name)
    key, _, ending = file.partition(".")
    return posixpath.join(folder, key), ending.lower()


def _is_picture(name: str) -> bool:
    return _split(name)[1].rsplit(".", 1)[-1] in _PICTURES


def _is_text(name: str) -> bool:
    return _split(name)[1].rsplit(".", 1)[-1] in _TEXTS


def _row(members: Mapping[str, bytes | None], names: Mapping[str, str]) -> dict[str, Any]:
    """A sample by the endings of its members: texts decoded, names of the others.

    Raises:
        DataError: a text is no UTF-8 or no JSON.
    """
    row: dict[str, Any] = {}
    for name, data in members.items():
        row["__key__"], ending = _split(name)
        if data is None:
            row[ending] = names[name]
            continue
        try:
            text = data.decode("utf-8")
            row[ending] = json.loads(text) if ending.rsplit(".", 1)[-1] == "json" else text
        except (ValueError, RecursionError) as error:
            raise DataError(f"{printable(name)} is no valid {ending}: {error}") from None
    return row
