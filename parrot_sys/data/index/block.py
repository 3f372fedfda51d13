"""Some records -> their columns: the work of one process that builds an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from parrot_sys.data.image_sources.data_urls import KEY, PREFIX, decode_url
from parrot_sys.data.index.columns import Array, Columns, Texts
from parrot_sys.data.index.settings import IndexSettings
from parrot_sys.data.parts import Turn, moves_images
from parrot_sys.data.records import Record, content_digest, describe_record, parse_record
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.templates import Segment
from parrot_sys.data.tokenization import Measures
from parrot_sys.errors import DataError, StorageError

BAD, MOVED, MARKERS, SYSTEM = 1, 2, 4, 8
"""Flags of a record: wrong, `front` moves an image, `<image>` that is text, a system turn."""
_NOTHING = Measures(0, [], [])
_READ = 128  # records in memory at once: they may hold pictures


class Encoder(Protocol):
    """Template and tokenizer of a model, as `ParrotProcessor` has them."""

    def render(self, turns: Sequence[Turn]) -> list[Segment]:
        """Segments of a conversation."""

    def measure(self, conversations: Sequence[Sequence[Segment]]) -> list[Measures]:
        """Lengths, images and labels of each conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexer:
    """Everything that a worker needs."""

    source: RecordSource
    encoder: Encoder
    settings: IndexSettings

    def columns(self, places: Array, first: int, pictures: Path) -> Columns:
        """Columns of the records at `places`, int64 [n, 2]; the first of them has the number `first`.

        Pictures that the records hold themselves go to the file `pictures`, which exists only if there are any.
        """
        block = _Block(self.source.path, pictures)
        with block.embedded:
            for start in range(0, len(places), _READ):
                raws = self.source.read([(a, b) for a, b in places[start : start + _READ].tolist()])
                self._add(block, raws, first + start)
        return block.columns(places)

    def _add(self, block: _Block, raws: Sequence[Any], first: int) -> None:
        records = [block.add(raw, number) for number, raw in enumerate(raws, first)]
        good = [record for record in records if record is not None]
        measured = iter(self.encoder.measure([self.encoder.render(record.turns) for record in good]))
        for record in records:
            block.add_measures(next(measured) if record is not None else _NOTHING)


@dataclass(slots=True)
class _Block:
    """Columns that grow record by record."""

    path: Path
    pictures: Path
    embedded: _EmbeddedPictures = field(init=False)
    tokens: list[int] = field(default_factory=list)
    markers: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    run_counts: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    languages: dict[str, int] = field(default_factory=dict)
    spoken: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    shown: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.embedded = _EmbeddedPictures(self.pictures)

    def add(self, raw: Any, number: int) -> Record | None:
        """Takes one record, without its lengths; None where it is wrong."""
        try:
            record = self._parse(raw, number)
        except StorageError:
            raise
        except DataError as error:
            # (Without the file's name, so that a data set can be moved together with its index.)
            self.problems.append((number, str(error).removeprefix(describe_record(self.path, number))))
            self._append(BAD, 0, 0, "", 0, ())
            return None
        system = SYSTEM if record.turns[0]["from"] == "system" else 0
        moved = MOVED if record.images and any(map(moves_images, record.turns)) else 0
        flags = system | moved | (MARKERS if record.text_markers else 0)
        # 0 stands for a record that states no language: the settings of training may name one for those.
        spoken = 0
        if raw.get("lang") is not None:
            spoken = 1 + self.languages.setdefault(record.language, len(self.languages))
        self._append(flags, len(record.turns), content_digest(record), record.record_id, spoken, record.images)
        return record

    def add_measures(self, measures: Measures) -> None:
        """Takes the lengths of a record: where its pictures stand and which stretches bear loss."""
        self.tokens.append(measures.size)
        self.markers += measures.images
        self.runs += measures.labels
        self.run_counts.append(len(measures.labels) // 2)

    def _parse(self, raw: Any, number: int) -> Record:
        record = parse_record(raw, number, self.path)
        if not any(name.startswith(PREFIX) for name in record.images):
            return record
        try:
            return replace(record, images=tuple(map(self.embedded.keep, record.images)))
        except StorageError:
            raise
        except DataError as error:
            raise DataError(f"{describe_record(self.path, number, record.record_id)}: {error}") from None

    def _append(self, flags: int, turns: int, digest: int, record_id: str, spoken: int, images: Sequence[str]) -> None:
        self.flags.append(flags)
        self.turns.append(turns)
        self.digests.append(digest)
        self.ids.append(record_id)
        self.spoken.append(spoken)
        self.counts.append(len(images))
        self.shown += [self.names.setdefault(name, len(self.names)) for name in images]

    def columns(self, places: Array) -> Columns:
        """Arrays of all that was added."""
        names, kept = list(self.names), self.embedded.places
        return {
            "places": np.asarray(places, dtype=np.int64).reshape(-1, 2),
            "tokens": np.array(self.tokens, dtype=np.int32),
            "markers": np.array(self.markers, dtype=np.int32),
            "runs": np.array(self.runs, dtype=np.int32).reshape(-1, 2),
            "run_counts": np.array(self.run_counts, dtype=np.int32),
            "flags": np.array(self.flags, dtype=np.uint8),
            "turns": np.array(self.turns, dtype=np.int32),
            "digests": np.array(self.digests, dtype=np.uint64),
            "spoken": np.array(self.spoken, dtype=np.int32),
            "picture_counts": np.array(self.counts, dtype=np.int32),
            "pictures": np.array(self.shown, dtype=np.int64),
            "picture_keys": _keys(names),
            "picture_places": np.array([kept.get(name, (-1, 0)) for name in names], dtype=np.int64).reshape(-1, 2),
            "problem_numbers": np.array([number for number, _ in self.problems], dtype=np.int64),
            **text_columns("ids", Texts.of(self.ids)),
            **text_columns("languages", Texts.of(self.languages)),
            **text_columns("picture_names", Texts.of(names)),
            **text_columns("problems", Texts.of(text for _, text in self.problems)),
        }


def text_columns(name: str, texts: Texts) -> Columns:
    """The two columns of texts."""
    return {f"{name}_ends": texts.ends, f"{name}_data": texts.data}


def texts_of(columns: Columns, name: str) -> Texts:
    """The texts of two columns."""
    return Texts(columns[f"{name}_ends"], columns[f"{name}_data"])


def _keys(names: Sequence[str]) -> Array:
    """Hashes of names, two numbers each, by which the same names of several blocks are found."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)


class _EmbeddedPictures:
    """Pictures that stand in the records as data URLs; they move to a file, each content once."""

    def __init__(self, path: Path) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self._path = path
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> _EmbeddedPictures:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, name: str) -> str:
        """The name; a short one for a data URL, whose picture is stored.

        Raises:
            DataError: the name is a data URL that cannot be read.
        """
        if not name.startswith(PREFIX):
            return name
        data = decode_url(name)
        key = KEY + hashlib.sha256(data).hexdigest()
        if key not in self.places:
            try:
                self._file = self._file or self._path.open("wb")
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                raise StorageError(
                    f"pictures of data URLs cannot be stored in {self._path.parent}: {error.strerror}; name a folder "
                    "with more room in data.index_dir"
                ) from error
            self.places[key] = (self._size, len(data))
            self._size += len(data)
        return key


def blocks_of(places: Iterator[tuple[int, int]], size: int) -> Iterator[Array]:
    """int64 [n, 2] of `size` places each; the last may be smaller."""
    block: list[tuple[int, int]] = []
    for place in places:
        block.append(place)
        if len(block) == size:
            yield np.array(block, dtype=np.int64)
            block.clear()
    if block:
        yield np.array(block, dtype=np.int64)
