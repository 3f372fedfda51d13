"""Shards of a data set: files that hold its records, here or behind an address, opened when a stream comes to them."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import glob
import json
import posixpath
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from parrot_sys.data.config import DataSource
from parrot_sys.data.record_files import LINE_SUFFIXES
from parrot_sys.data.remote.copies import columns_of, copy_records, place_of_copy
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.data.sources import arrow_files, parquet_files
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import DataError, printable

_KINDS = (arrow_files.ENDINGS, parquet_files.ENDINGS, (".tar",), (".json", *LINE_SUFFIXES))
"""Endings of files in the order in which kinds of data sets are asked; a folder's shards are of the first it has."""
_ENDINGS = sum(_KINDS, ())


class Shard(Protocol):
    """A file with records."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""

    def open(self) -> RecordSource:
        """Its records. What is opened is freed with the last reference to it."""


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A file of this machine."""

    source: RecordSource

    @property
    def name(self) -> str:
        """Its path."""
        path = self.source.path
        return str(path if path.is_file() else path / self.source.state()[0][0])

    def open(self) -> RecordSource:
        """Its records, in a source of its own."""
        return copy.copy(self.source)


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A file behind an address: copied to this machine while any of its processes reads it."""

    name: str
    storage: RemoteStorage
    cache_dir: str | None
    columns: str | None = None
    """Address of the file of columns of all shards."""

    def open(self) -> RecordSource:
        """Its records, from the copy."""
        place = place_of_copy(self.name, self.cache_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        users = (place.parent / ".users").open("ab")
        with contextlib.suppress(OSError):  # (where files cannot be locked, a copy may be made again)
            fcntl.flock(users, fcntl.LOCK_SH)
        copy_records(self.name, place, self.storage, columns=self.columns)
        source = open_source(place)
        weakref.finalize(source, _remove, place, users)
        return source


def _remove(place: Path, users: BinaryIO) -> None:
    """Removes a copy unless another process uses it."""
    with users, contextlib.suppress(OSError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in place.parent.iterdir():
            if path.name.startswith(place.name):  # (the index of a tar lies beside it)
                path.unlink()


def shards_of(source: DataSource, storage: RemoteStorage, cache_dir: str | None) -> list[Shard]:
    """Shards of a data set, in an order that is the same in every process.

    Raises:
        DataError: there is none, or the address is one that only an index can read.
    """
    if not source.address:
        return [LocalShard(shard) for shard in open_source(source.path).shards()]
    url = source.address.rstrip("/")
    if glob.has_magic(url):
        addresses = [each for each in storage.find(url) if each.lower().endswith(_ENDINGS)]
    elif url.lower().endswith(_ENDINGS):
        storage.state(url)
        addresses = [url]
    else:
        addresses = _shards_below(url, storage)
    if not addresses:
        raise DataError(f"data set {printable(url)} is missing: no file that ends in {', '.join(_ENDINGS)} is there")
    columns = None if addresses == [url] else columns_of(url, storage) or _inner_columns(url, storage)
    return [RemoteShard(address, storage, cache_dir, columns) for address in addresses]


def _inner_columns(url: str, storage: RemoteStorage) -> str | None:
    return None if glob.has_magic(url) else columns_of(f"{url}/*", storage)


def _shards_below(url: str, storage: RemoteStorage) -> list[str]:
    """Shards of a folder behind an address, as the kind of data set that it is has them."""
    files = storage.below(url)
    if meta := next((name for name in files if ".nv-meta" in name.split("/")), None):
        raise DataError(
            f"data set {printable(url)} is an energon folder ({posixpath.dirname(meta)}), which no stream reads from "
            "an address: name its shards by a pattern, or copy its folder"
        )
    if arrow_files.SPLITS in files:
        raise arrow_files.several_splits(_json(files[arrow_files.SPLITS], storage), url)
    if arrow_files.STATE in files:
        names = arrow_files.listed_files(_json(files[arrow_files.STATE], storage), url)
        return [files.get(name, f"{url}/{name}") for name in names]
    for endings in _KINDS:
        if shards := [address for name, address in files.items() if name.lower().endswith(endings)]:
            return shards
    return []


def _json(address: str, storage: RemoteStorage) -> Any:
    try:
        content = json.loads(storage.read_whole(address))
        if isinstance(content, dict):
            return content
    except ValueError as error:
        raise DataError(f"{printable(address)} is no JSON: {error}") from None
    raise DataError(f"{printable(address)} must hold a JSON object")
