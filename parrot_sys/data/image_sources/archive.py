"""ArchiveSet: pictures in archives of any kind, found by name through an index that is built once and kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from parrot_sys.data.cached_arrays import read_array, write_array
from parrot_sys.data.image_files import OpenFile
from parrot_sys.data.image_sources.base import inner_name, shown
from parrot_sys.data.remote.file import LocalFile, StoredFile
from parrot_sys.errors import DataError, printable

logger = logging.getLogger(__name__)
INDEX_ENDING = ".parrot-index"
_VERSION = 1
_ENTRY = np.dtype([(name, np.uint64) for name in ("high", "low", "first", "second", "refused")])
_Entries = npt.NDArray[Any]
_Advance = Callable[[int], object]


class Member(NamedTuple):
    """A picture in an archive."""

    name: str
    first: int
    second: int
    """Where it is, in two numbers that the kind of archive chooses."""
    refused: int = 0
    """Place in `Archive.REFUSED` of the reason why it is not read; 0 for a picture that is."""


class Archive(ABC):
    """One archive. The file must not change while it is in use: that is checked whenever it is read."""

    ENDINGS: ClassVar[tuple[str, ...]]
    """How the names of such files end, in lower case: the usual ending first, then those that are only refused."""
    REFUSED: ClassVar[tuple[str, ...]] = ("",)
    """Reasons why a member is not read, from place 1."""

    def __init__(self, file: StoredFile) -> None:
        self.file, self.state = file, file.state
        self.name = printable(file.name)
        """For messages."""

    @abstractmethod
    def members(self, advance: _Advance) -> Iterator[Member]:
        """All members; of two with the same name the later one counts.

        Args:
            advance: called now and then with the bytes of the file that were passed since the last call.

        Raises:
            DataError: the file is damaged or of a kind that cannot be read by random access; names file and reason.
        """

    @abstractmethod
    def open(self, first: int, second: int) -> OpenFile:
        """The picture at a place, as a file with a position of its own.

        Raises:
            StorageError: the archive is no longer what it was when it was opened first.
        """


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """A picture in an archive, for `load_image`."""

    archive: Archive
    name: str
    first: int
    second: int

    def open(self) -> OpenFile:
        """Its bytes, as a file."""
        return self.archive.open(self.first, self.second)

    def __str__(self) -> str:
        return f"{self.archive.file.name}/{self.name}"


class ArchiveSet:
    """Pictures in one or more archives. 52 bytes of memory a member.

    A name is the member's, or the archive's followed by the member's: `train-003.tar/a.jpg`, `train-003/a.jpg`.
    """

    def __init__(self, root: str | Path, archives: Sequence[Archive], index_dir: str | Path | None = None) -> None:
        """
        Args:
            root: the image root, for messages.
            archives: in any order.
            index_dir: where indexes are kept when they cannot be written beside the archives; None keeps none then.
        """
        self._root = root
        self._archives = sorted(archives, key=lambda archive: archive.file.place)
        self._index_dir = index_dir
        self._lock = threading.Lock()

    def problem(self, name: str) -> str | None:
        """Why the picture of this name cannot be used; None where it can."""
        found = self.find(name)
        if found is None:
            return f"image {shown(name)} is missing in {printable(self._root)}"
        return found if isinstance(found, str) else None

    def picture(self, name: str) -> ArchivedImage:
        """The picture of a name that has no problem."""
        found = self.find(name)
        if not isinstance(found, ArchivedImage):
            raise DataError(self.problem(name) or "")
        return found

    def forget(self) -> None:
        """Nothing to free: the index is what finds pictures."""

    def load(self) -> None:
        """Reads the indexes, and builds those that are missing.

        Raises:
            DataError: an archive is missing, damaged or of a kind that cannot be read by random access; names it.
        """
        with self._lock:
            _ = self._table

    def find(self, name: str) -> ArchivedImage | str | None:
        """The picture of a name; why it cannot be used; None where no archive has one of this name."""
        self.load()
        plain = inner_name(name)
        if plain is None:
            return f"image {shown(name)} leads out of the image root {printable(self._root)}"
        matches = self._matches(plain)
        if not matches:
            parts = plain.split("/")
            for split in range(1, len(parts)):
                archives, rest = self._labels.get("/".join(parts[:split]), []), "/".join(parts[split:])
                matches += [match for match in self._matches(rest) if match[0] in archives]
        if not matches:
            return None
        if len(matches) > 1:
            places = [self._archives[archive].file.name for archive, _ in matches]
            return (
                f"image {shown(name)} is in {len(places)} archives, {shown(places[0])} and {shown(places[1])} among "
                "them: put the name of the archive and a / before it"
            )
        archive, entry = self._archives[matches[0][0]], matches[0][1]
        if refused := int(entry["refused"]):
            return f"image {shown(name)} in {shown(archive.file.name)} {archive.REFUSED[refused]}"
        return ArchivedImage(archive, plain, int(entry["first"]), int(entry["second"]))

    def _matches(self, plain: str) -> list[tuple[int, Any]]:
        """(number of the archive, entry) of each member of this name."""
        highs, entries, numbers = self._table
        try:
            high, low = _key(plain)
        except UnicodeEncodeError:  # half a surrogate pair: no member can have this name
            return []
        at, matches = int(np.searchsorted(highs, np.uint64(high))), []
        while at < len(highs) and highs[at] == high:
            if entries["low"][at] == low:
                matches.append((int(numbers[at]), entries[at]))
            at += 1
        return matches

    @cached_property
    def _labels(self) -> dict[str, list[int]]:
        """Prefixes that a member's name may have -> numbers of the archives that it may mean."""
        paths = [os.path.abspath(archive.file.place) for archive in self._archives]
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        labels: dict[str, list[int]] = {}
        for number, archive in enumerate(self._archives):
            for whole in {os.path.relpath(paths[number], common), archive.file.place.name}:
                for label in {whole, os.path.splitext(whole)[0]}:
                    labels.setdefault(label, []).append(number)
        return labels

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.uint64], _Entries, npt.NDArray[np.uint32]]:
        """`high` of all members, sorted; their entries; the numbers of their archives."""
        total = sum(archive.state[0] for archive in self._archives)
        with tqdm(
            total=total,
            desc=f"index {Path(self._root).name}",
            unit="B",
            unit_scale=True,
            delay=1,
            disable=not sys.stderr.isatty(),
        ) as bar:
            indexes = [_index(archive, self._index_dir, bar.update) for archive in self._archives]
        numbers = np.repeat(np.arange(len(indexes), dtype=np.uint32), [len(index) for index in indexes])
        entries = np.concatenate(indexes)
        order = np.argsort(entries["high"], kind="stable")
        return entries["high"][order], entries[order], numbers[order]


def _index(archive: Archive, index_dir: str | Path | None, advance: _Advance) -> _Entries:
    """The members of an archive, from its index if there is one of the file as it is now."""
    places = _places(archive.file, index_dir)
    if (found := _read_index(places, archive)) is None:
        with _one_process_at_a_time(archive):
            if (found := _read_index(places, archive)) is None:  # (another process may have built it meanwhile)
                found = _build_index(archive, advance)
                _keep_index(places, archive, found)
                return found
    advance(archive.state[0])
    return found


def _places(file: StoredFile, index_dir: str | Path | None) -> list[Path]:
    """Where the index of an archive may be kept, best first."""
    places: list[Path] = []
    real = file.name
    if isinstance(file, LocalFile):
        places.append(file.place.with_name(file.place.name + INDEX_ENDING))
        real = os.path.realpath(file.place)
    if index_dir is not None:
        places.append(Path(index_dir) / f"archive-{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}{INDEX_ENDING}")
    return places


def _read_index(places: Sequence[Path], archive: Archive) -> _Entries | None:
    for place in places:
        values = read_array(place, np.uint64)
        if values is not None and values.ndim == 1 and values[:3].tolist() == [_VERSION, *archive.state]:
            return values[3:].view(_ENTRY)
    return None


def _keep_index(places: Sequence[Path], archive: Archive, entries: _Entries) -> None:
    values = np.concatenate([np.array([_VERSION, *archive.state], np.uint64), entries.view(np.uint64)])
    for place in places:
        with contextlib.suppress(OSError):
            write_array(place, values)
            return
    logger.warning(
        "the index of %s can be kept in none of %s, and is built at every start; name a folder in data.cache_dir",
        *(archive.name, ", ".join(map(str, places)) or "any folder"),
    )


def _build_index(archive: Archive, advance: _Advance) -> _Entries:
    logger.info("building the index of %s (%.1f MB)", archive.name, archive.state[0] / 1e6)
    rows, outside = array("Q"), 0
    for member in archive.members(advance):
        plain = inner_name(member.name)
        if plain is None:
            outside += 1
            continue
        rows.extend((*_key(plain), member.first, member.second, member.refused))
    archive.file.check()
    entries = np.frombuffer(rows, np.uint64).view(_ENTRY) if rows else np.empty(0, _ENTRY)
    order = np.lexsort((entries["low"], entries["high"]))  # (stable: the later of two is the last)
    keys = np.stack([entries["high"][order], entries["low"][order]])
    is_last = np.ones(len(entries), bool)
    is_last[:-1] = (keys[:, 1:] != keys[:, :-1]).any(0)
    kept = order[is_last]
    if outside:
        logger.warning("%d members of %s have names that lead out of it: they are refused", outside, archive.name)
    if len(kept) < len(entries):
        logger.warning(
            "%d members of %s have the name of a later one, which counts", len(entries) - len(kept), archive.name
        )
    return entries[kept]


def _key(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@contextlib.contextmanager
def _one_process_at_a_time(archive: Archive) -> Iterator[None]:
    """Waits for other processes of this machine that build the index; where files cannot be locked, each builds it."""
    descriptor = archive.file.lockable()
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for the process that builds the index of %s", archive.name)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
