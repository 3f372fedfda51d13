"""RecordIndex: facts about the records of one data set, mapped into memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from parrot_sys.data.image_files import ImageFile, OpenFile
from parrot_sys.data.image_sources.base import shown
from parrot_sys.data.image_sources.data_urls import KEY
from parrot_sys.data.index.block import BAD, MARKERS, MOVED, texts_of
from parrot_sys.data.index.columns import Array, Columns, Texts, map_columns
from parrot_sys.data.remote.file import open_section
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.files import replace_text

logger = logging.getLogger(__name__)
VERSION = 1
HEADER = "index.json"
PICTURES = "pictures.bin"


class RecordIndex:
    """Facts about all records of a data set, by number from 0. Everything is mapped: ranks share its memory."""

    def __init__(self, folder: Path, header: Mapping[str, Any], columns: Columns) -> None:
        self.folder, self.header = folder, header
        self.digest: str = header["digest"]
        """Hash of the data set."""
        self.places: Array = columns["places"]
        """[n, 2] for `RecordSource.read`."""
        self.tokens: Array = columns["tokens"]
        """[n] ids of each record, with one for each picture; 0 of a wrong record."""
        self.markers: Array = columns["markers"]
        """Places of the pictures among the ids of their records, aligned with `pictures`."""
        self.runs: Array = columns["runs"]
        """[r, 2] first id and id after the last of each stretch that bears loss, one record after the other."""
        self.run_ends: Array = columns["run_ends"]
        """[n] end of each record's part of `runs`."""
        self.turns: Array = columns["turns"]
        """[n] turns, a system turn included."""
        self.digests: Array = columns["digests"]
        """[n] `content_digest`."""
        self.spoken: Array = columns["spoken"]
        """[n] language: 0 where the record states none, else 1 + place in `languages`."""
        self.pictures: Array = columns["pictures"]
        """Pictures of all records, one record after the other: places in `picture_names`."""
        self.picture_ends: Array = columns["picture_ends"]
        """[n] end of each record's part of `pictures`."""
        self.flags: Array = columns["flags"]
        self.problem_numbers: Array = columns["problem_numbers"]
        """Numbers of the wrong records."""
        self.ids, self.languages, self.picture_names, self.problems = (
            texts_of(columns, name) for name in ("ids", "languages", "picture_names", "problems")
        )
        self._picture_places: Array = columns["picture_places"]
        # (Opened at once: nothing is found under its name any more when another process has built the index again.)
        self._pictures_file: BinaryIO | None = (folder / PICTURES).open("rb") if header["pictures"] else None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_good(self) -> Array:
        """[n] whether a record could be read."""
        return (self.flags & BAD) == 0

    @property
    def moved(self) -> Array:
        """Numbers of the records of which `data.image_position=front` moves an image."""
        return np.flatnonzero(self.flags & MOVED)

    @property
    def text_markers(self) -> Array:
        """Numbers of the records that hold `<image>` as text."""
        return np.flatnonzero(self.flags & MARKERS)

    @property
    def picture_counts(self) -> Array:
        """[n] pictures of each record."""
        return np.diff(self.picture_ends, prepend=0)

    def pictures_of(self, number: int) -> tuple[str, ...]:
        """Names of the pictures of a record, in order."""
        start = int(self.picture_ends[number - 1]) if number else 0
        return tuple(self.picture_names[i] for i in self.pictures[start : int(self.picture_ends[number])].tolist())

    @cached_property
    def own_pictures(self) -> OwnPictures:
        """Pictures that stood in the records themselves."""
        return OwnPictures(self._pictures_file, self.picture_names, self._picture_places)


@dataclass(frozen=True, slots=True)
class _OwnPicture:
    file: BinaryIO
    start: int
    size: int
    name: str

    def open(self) -> OpenFile:
        return open_section(os.dup(self.file.fileno()), self.start, self.size)

    def __str__(self) -> str:
        return self.name


class OwnPictures:
    """The pictures of data URLs, in a file of the index: an `ImageSource`. 16 bytes of memory a picture."""

    def __init__(self, file: BinaryIO | None, names: Texts, places: Array) -> None:
        self._file, self._places = file, places
        numbers = np.flatnonzero(places[:, 0] >= 0)
        keys = np.array([_key(names[i]) for i in numbers.tolist()], dtype=np.uint64)
        order = np.argsort(keys)
        self._keys, self._numbers = keys[order], numbers[order]

    def problem(self, name: str) -> str | None:
        """Why the picture of this name cannot be used; None where it can."""
        return f"image {shown(name)} is not in the index" if self._find(name) is None else None

    def picture(self, name: str) -> ImageFile:
        """The picture of a name that has no problem."""
        number = self._find(name)
        assert number is not None, f"{name} has a problem"
        assert self._file is not None, "an index with places of pictures has their file"
        start, size = self._places[number].tolist()
        return _OwnPicture(self._file, start, size, name)

    def forget(self) -> None:
        """Nothing to free."""

    def _find(self, name: str) -> int | None:
        if not len(self._keys) or not name.startswith(KEY):
            return None
        key = _key(name)
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        return int(self._numbers[at]) if at < len(self._keys) and self._keys[at] == key else None


def _key(name: str) -> int:
    return int(name[len(KEY) : len(KEY) + 16], 16)


def open_index(folder: Path, source: RecordSource, settings: Mapping[str, Any]) -> RecordIndex | None:
    """The index in a folder; None where there is none of these settings and of the data set as it is now.

    A damaged one and one of other data are named in the log.
    """
    header = read_header(folder)
    if header is None or header.get("version") != VERSION or header["settings"] != settings:
        return None
    try:
        columns = map_columns(folder, header["columns"])
        if header["pictures"] != pictures_size(folder):
            raise ValueError(f"{PICTURES} does not have its {header['pictures']} bytes")
    except (OSError, ValueError) as error:
        logger.warning("index %s is damaged: %s; it is built again", folder, error)
        return None
    if not _is_current(folder, header, source):
        logger.warning("data set %s has changed since its index %s was built: it is indexed again", source.path, folder)
        return None
    return RecordIndex(folder, header, columns)


def read_header(folder: Path) -> dict[str, Any] | None:
    """Header of an index; None without one, or where its header is damaged."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"version", "settings", "columns", "digest", "files", "pictures"}
    return header if isinstance(header, dict) and needed <= header.keys() else None


def _is_current(folder: Path, header: dict[str, Any], source: RecordSource) -> bool:
    """Whether the data set is what was indexed; files that only have other times are hashed again."""
    files = plain_state(source)
    if files == header["files"]:
        return True
    if [file[:2] for file in files] != [file[:2] for file in header["files"]] or source.digest() != header["digest"]:
        return False
    try:
        replace_text(folder / HEADER, json.dumps(header | {"files": files}) + "\n")
    except OSError as error:  # (a folder of somebody else: the next start hashes the files again)
        logger.warning("%s cannot be written: %s", folder / HEADER, error.strerror)
    return True


def pictures_size(folder: Path) -> int:
    """Bytes of the pictures that the records hold themselves."""
    path = folder / PICTURES
    return path.stat().st_size if path.exists() else 0


def plain_state(source: RecordSource) -> list[list[Any]]:
    """State of the files, for JSON."""
    return [list(file) for file in source.state()]
