"""RecordSource: the records of one data set by position, however they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from parrot_sys.data.image_sources.base import ImageSource

Place = tuple[int, int]
"""Position of a record, in two integers that the kind of source chooses: first and last byte, row group and row, ..."""
Advance = Callable[[int], object]
"""Called now and then with the bytes that were passed since the last call."""
FileState = tuple[str, int, int]
"""Name, size and time of the last change (ns) of a file: other ones mean another content."""


def ignore_progress(count: int) -> None:
    """An `Advance` that shows nothing."""


class RecordSource(ABC):
    """Records of one data set in a fixed order.

    An index (`parrot_sys.data.index`) lists the places once for each content of the files; from then on records are
    read by place, from several threads and processes. A source is pickled to other processes: it opens its files when
    they are first read, and a pickle holds none.

    A raw record is what `parse_record` takes: a mapping, anything else that the data hold in its place, or a DataError
    where this one record cannot be read.
    """

    NAME: ClassVar[str]
    """Of this kind, for messages: `JSON`."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the data set, as `data.paths` names it.
        """
        self.path = path

    @classmethod
    @abstractmethod
    def takes(cls, path: Path) -> bool:
        """Whether a data set at this path is of this kind; the first kind of the registry that says so reads it."""

    @abstractmethod
    def state(self) -> list[FileState]:
        """States of all files that the records come from, in a fixed order; cheap, since every start asks.

        Raises:
            DataError: a file is missing or cannot be read; names it.
        """

    @abstractmethod
    def digest(self, advance: Advance = ignore_progress) -> str:
        """Hash of the content, as a hexadecimal number: equal for copies, whatever their names and times are."""

    @abstractmethod
    def scan(self, advance: Advance = ignore_progress) -> Iterator[Place]:
        """Places of all records in their order.

        Raises:
            DataError: the data set cannot be read to its end; names file and reason.
        """

    @abstractmethod
    def read(self, places: Sequence[Place]) -> list[Any]:
        """Raw records of some places, in the order of `places`.

        Raises:
            StorageError: the files are no longer what they were when `scan` listed the places.
        """

    def records(self, advance: Advance = ignore_progress) -> Iterator[Any]:
        """All raw records in their order, for who needs no places."""
        block: list[Place] = []
        for place in self.scan(advance):
            block.append(place)
            if len(block) == _BLOCK:
                yield from self.read(block)
                block.clear()
        yield from self.read(block)

    def pictures(self) -> ImageSource | None:
        """Pictures that lie in the data set itself, by the names that its records give; None where it has none."""
        return None

    def shards(self) -> list[RecordSource]:
        """The files that records come from, each as a source of its own; the data set itself where it is one file."""
        return [self]

    def rows(self) -> RecordSource:
        """The source whose raw records a file of columns is about."""
        return self

    def size(self) -> int:
        """Bytes of all files, for progress."""
        return sum(size for _, size, _ in self.state())


_BLOCK = 1024  # records that `records` reads at once
