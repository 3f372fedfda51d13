"""TableRecords: a row is a record. Pictures may be cells of the table, or names of files.

Columns are fields of a record by their names (`columns.py` gives them others). A column of bytes, a struct of `bytes`
and `path` (Hugging Face's Image) and a list of either are pictures; only what `picture` asks for is read of them.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.data.image_sources.base import shown
from parrot_sys.data.sources.base import Advance, FileState, Place, RecordSource, ignore_progress
from parrot_sys.data.sources.columns import plain_turns
from parrot_sys.data.sources.files import changed, file_states
from parrot_sys.errors import ConfigError, DataError, printable
from parrot_sys.files import errors_named

_CELL = re.compile(r"cell:(\d+):(\d+):(\d+):(.+)", re.DOTALL)


class TableFile:
    """One file of a table. A block is a part that is decoded as one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = file_states([path], path)[0]

    @property
    @abstractmethod
    def schema(self) -> Any:
        """The Arrow schema."""

    @property
    @abstractmethod
    def blocks(self) -> list[int]:
        """Rows of each block."""

    @abstractmethod
    def rows(self, block: int) -> Any:
        """A block as an Arrow table without the bytes of pictures (`without_bytes`)."""

    @abstractmethod
    def has_bytes(self, block: int, column: str) -> bool:
        """Whether any picture of a column holds its bytes."""

    @abstractmethod
    def cell(self, block: int, row: int, column: str) -> Any:
        """The Python value of a cell."""

    @abstractmethod
    def add_to(self, digest: Any) -> None:
        """Puts all columns but the bytes of pictures into a hash."""

    def check(self) -> None:
        """
        Raises:
            StorageError: the file is no longer what it was when it was opened.
        """
        try:
            same = file_states([self.path], self.path)[0] == self.state
        except DataError:
            same = False
        if not same:
            raise changed(self.path)


class TableRecords(RecordSource):
    """A place is the number of a block, through all files, and a row in it."""

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @abstractmethod
    def files(self) -> list[Path]:
        """Files of the data set in their order."""

    @abstractmethod
    def open(self, path: Path) -> TableFile:
        """Opens one."""

    def state(self) -> list[FileState]:
        """States of the files."""
        return file_states(self.files(), self.path)

    def digest(self, advance: Advance = ignore_progress) -> str:
        """SHA-256 of the columns of the records; of pictures in the table only names count, as with those in files."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(repr((str(file.schema.remove_metadata()), file.blocks)).encode())
            with self._named(file):
                file.add_to(digest)
            advance(file.state[1])
        return digest.hexdigest()

    def scan(self, advance: Advance = ignore_progress) -> Iterator[Place]:
        """Places of all rows; no row is read."""
        first = 0
        for file in self._files:
            for block, rows in enumerate(file.blocks, first):
                yield from ((block, row) for row in range(rows))
            first += len(file.blocks)
            advance(file.state[1])

    def read(self, places: Sequence[Place]) -> list[Any]:
        """Records of some rows; each block that they are in is decoded once."""
        records: dict[Place, Any] = {}
        for block in sorted({block for block, _ in places}):
            file, own = self._block(block)
            file.check()
            with self._named(file):
                table = file.rows(own)
                pictures = {
                    name: file.has_bytes(own, name) for name in table.schema.names if holds_bytes(file.schema, name)
                }
            for row in {row for each, row in places if each == block}:
                records[block, row] = self._record(table.slice(row, 1).to_pylist()[0], pictures, block, row)
        return [records[place] for place in places]

    def shards(self) -> list[RecordSource]:
        """Each file."""
        return [type(self)(path) for path in self.files()]

    def pictures(self) -> CellPictures:
        """The pictures that are cells."""
        return CellPictures(self)

    def cell(self, name: str) -> Any:
        """The bytes of a picture by its name; None where there are none.

        Raises:
            DataError: no picture has this name.
        """
        match = _CELL.fullmatch(name)
        if match is None:
            raise DataError(f"image {shown(name)} is no cell of {printable(self.path)}")
        block, row, item, column = int(match[1]), int(match[2]), int(match[3]), match[4]
        file, own = self._block(block)
        file.check()
        if row >= file.blocks[own] or column not in file.schema.names:
            raise DataError(f"image {shown(name)} is no cell of {printable(self.path)}")
        with self._named(file):
            value = file.cell(own, row, column)
        value = value[item] if isinstance(value, list) and item < len(value) else value
        return value.get("bytes") if isinstance(value, Mapping) else value

    def _record(self, row: dict[str, Any], pictures: Mapping[str, bool], block: int, number: int) -> Any:
        for column, has_bytes in pictures.items():
            values = row[column]
            if isinstance(values, list):
                row[column] = [_name(value, has_bytes, block, number, i, column) for i, value in enumerate(values)]
            else:
                row[column] = _name(values, has_bytes, block, number, 0, column)
        return plain_turns(row)

    @cached_property
    def _files(self) -> list[TableFile]:
        files = []
        for path in self.files():
            with errors_named(f"data set {printable(path)}", DataError):
                files.append(self.open(path))
        return files

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first block of each file, and one past the last."""
        starts = [0]
        for file in self._files:
            starts.append(starts[-1] + len(file.blocks))
        return starts

    def _block(self, number: int) -> tuple[TableFile, int]:
        for file, start, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= number < end:
                return file, number - start
        raise DataError(f"data set {printable(self.path)} has no block {number}")

    def _named(self, file: TableFile) -> Any:
        return errors_named(f"data set {printable(file.path)}", DataError)


@dataclass(frozen=True, slots=True)
class CellPictures:
    """Pictures in the cells of a table, by the names that its records give them."""

    table: TableRecords

    def problem(self, name: str) -> str | None:
        """Whether the name is one of a cell."""
        return None if _CELL.fullmatch(name) else f"image {shown(name)} is no cell of {printable(self.table.path)}"

    def picture(self, name: str) -> CellPicture:
        """The picture of a cell."""
        return CellPicture(self.table, name)

    def forget(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True)
class CellPicture:
    """A picture in a cell, for `load_image`."""

    table: TableRecords
    name: str

    def open(self) -> io.BytesIO:
        """Its bytes."""
        if (data := self.table.cell(self.name)) is None:
            raise DataError("has no bytes: its cell is null")
        return io.BytesIO(data)

    def __str__(self) -> str:
        return f"{self.table.path}/{self.name}"


def import_arrow(name: str, path: Path) -> Any:
    """A module of pyarrow.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"data set {printable(path)} needs pyarrow; fix: pip install 'parrot_sys[parquet]'") from None


def holds_bytes(schema: Any, name: str) -> bool:
    """Whether a column is one of pictures."""
    return _is_picture(schema.field(name).type)


def without_bytes(array: Any) -> Any:
    """An Arrow array of pictures with, for each, its struct without `bytes`, or whether it is there."""
    import pyarrow
    from pyarrow import types

    kind = array.type
    if _is_binary(kind):
        return array.is_valid()
    if types.is_struct(kind):
        rest = [kind.field(i) for i in range(kind.num_fields) if not _is_binary(kind.field(i).type)]
        if not rest:
            return array.is_valid()
        children = [array.field(field.name) for field in rest]
        return pyarrow.StructArray.from_arrays(children, fields=rest, mask=array.is_null())
    made = pyarrow.LargeListArray if types.is_large_list(kind) else pyarrow.ListArray
    return made.from_arrays(
        array.offsets, without_bytes(array.values), mask=array.is_null() if array.null_count else None
    )


def _is_picture(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_binary(kind.field(i).type) for i in range(kind.num_fields))
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _name(value: Any, has_bytes: bool, block: int, row: int, item: int, column: str) -> str | None:
    """Name of a picture; None where there is none."""
    if value is None or value is False:
        return None
    if not has_bytes and isinstance(value, Mapping):
        path = value.get("path")
        return path if isinstance(path, str) else None
    return f"cell:{block}:{row}:{item}:{column}"
