"""ColumnMap: rows of other people's tables -> raw records, as a small YAML file says.

Each key of the file is a field of a record (docs/data.md), each value the column that holds it. A value with braces is
a text with columns in it; `conversations` may be a list of turns made of such texts:

    id: uid
    image: picture
    lang: meta.language
    conversations:
      - {from: human, value: "<image>\\n{question}"}
      - {from: gpt, value: "{answers.0}"}
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.config_values import nearest, read_yaml
from parrot_sys.data.image_sources.base import ImageSource
from parrot_sys.data.layouts import IMAGE_FIELDS, TURN_LISTS
from parrot_sys.data.sources.base import Advance, FileState, Place, RecordSource, ignore_progress
from parrot_sys.data.sources.files import file_states
from parrot_sys.errors import ConfigError, DataError, printable

FIELDS = ("id", "lang", "system", *IMAGE_FIELDS, *TURN_LISTS)
_TURN_KEYS = ("from", "value", "input")
_COLUMN = re.compile(r"\{([^{}]+)\}")
ENDING = ".columns.yaml"


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Mapping that a file of columns states."""

    fields: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> ColumnMap:
        """
        Raises:
            ConfigError: the file is no such YAML; names it and what is wrong.
        """
        values = read_yaml(path)
        for name, value in values.items():
            if name not in FIELDS:
                guess = nearest(str(name), FIELDS)
                hint = f"; did you mean {guess}?" if guess else ""
                raise ConfigError(f"{path}: {name!r} is no field of a record; known are {', '.join(FIELDS)}{hint}")
            if isinstance(value, list) and name in TURN_LISTS:
                _check_turns(value, f"{path}: {name}")
            elif not isinstance(value, str):
                raise ConfigError(f"{path}: {name} must name a column, got {value!r}")
        if not any(name in values for name in TURN_LISTS):
            raise ConfigError(f"{path} must say where the turns are: {TURN_LISTS[0]}")
        return ColumnMap(values)

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The raw record of a row.

        Raises:
            DataError: the row lacks a column; names those that it has.
        """
        return {name: self._value(value, row) for name, value in self.fields.items()}

    def _value(self, value: Any, row: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            return [{key: _fill(text, row) if key != "from" else text for key, text in turn.items()} for turn in value]
        return _fill(value, row) if _COLUMN.search(value) else look_up(row, value)


class MappedRecords(RecordSource):
    """Records of another source, whose rows become records as a file of columns says."""

    def __init__(self, rows: RecordSource, columns: Path) -> None:
        """
        Args:
            rows: source of the rows.
            columns: file of columns.
        """
        super().__init__(rows.path)
        self._rows, self._columns = rows, columns
        self.NAME = rows.NAME  # type: ignore[misc]

    @classmethod
    def takes(cls, path: Path) -> bool:
        """No path: the registry makes one where there is a file of columns."""
        return False

    def state(self) -> list[FileState]:
        """States of the files, and of the file of columns."""
        return [*self._rows.state(), *file_states([self._columns], self.path)]

    def digest(self, advance: Advance = ignore_progress) -> str:
        """Hash of the rows and of the file of columns."""
        parts = (self._rows.digest(advance).encode(), self._columns.read_bytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def scan(self, advance: Advance = ignore_progress) -> Iterator[Place]:
        """Places of all rows."""
        return self._rows.scan(advance)

    def read(self, places: Sequence[Place]) -> list[Any]:
        """Records of some rows."""
        return list(map(self._record, self._rows.read(places)))

    def pictures(self) -> ImageSource | None:
        """Columns of the rows."""
        return self._rows.pictures()

    def shards(self) -> list[RecordSource]:
        """The shards of the rows."""
        return [MappedRecords(rows, self._columns) for rows in self._rows.shards()]

    def size(self) -> int:
        """Bytes of the rows."""
        return self._rows.size()

    def _record(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        try:
            return plain_turns(self._map.record(row))
        except DataError as error:
            return error

    @cached_property
    def _map(self) -> ColumnMap:
        return ColumnMap.read(self._columns)


def find_columns(path: Path) -> Path | None:
    """The file of columns of a data set: beside it (`NAME.columns.yaml`), or `columns.yaml` in its folder."""
    places = [path.with_name(path.name + ENDING)] if path.name else []
    if path.is_dir() or glob.has_magic(str(path)):
        places.append((path if path.is_dir() else path.parent) / ENDING[1:])
    return next((place for place in places if place.is_file()), None)


def plain_turns(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with lists of turns as lists of mappings: tables also have them as JSON, or as a mapping of lists."""
    return {name: _turns(value) if name in TURN_LISTS else value for name, value in record.items()}


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """Value of a column; dots lead into it (`meta.language`, `answers.0`).

    Raises:
        DataError: there is no such column.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif value is None:
            return None
        else:
            raise DataError(f"has no column {column!r}; it has {', '.join(map(printable, row))}")
    return value


def _fill(text: str, row: Mapping[str, Any]) -> str:
    def content(match: re.Match[str]) -> str:
        value = look_up(row, match[1])
        if value is None:
            return ""
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return _COLUMN.sub(content, text)


def _turns(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if columns and all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _check_turns(turns: Sequence[Any], where: str) -> None:
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys() <= set(_TURN_KEYS):
            raise ConfigError(f"{where}[{index}] must have from, value and perhaps input, got {turn!r}")
        if not all(isinstance(text, str) for text in turn.values()):
            raise ConfigError(f"{where}[{index}] must hold texts, got {turn!r}")
