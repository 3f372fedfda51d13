"""Cells of a tab-separated table as text, every row kept.

Read as `pandas.read_csv(sep="\\t")`, the public kit's reader, does: a cell that begins with a quotation mark goes on to
the closing one, over tabs and line breaks; a doubled mark inside is one mark; blank lines are no rows; LF, CRLF or CR
ends a line; a byte-order mark is skipped. One thing is different. Many tables are written without quoting, and a cell
of theirs may begin with a mark that nothing closes, or that another row's closes by accident: pandas then takes all
rows up to there for one cell, without a word. Here such a mark is text, and `Cells.literal` says where.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parrot_sys.errors import DataError

_FIELD = re.compile(r'"((?:[^"]++|"")*+)"([^\t\r\n]*+)|([^\t\r\n]*+)')
_REPLACED = "\ufffd"
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_LINE_END = re.compile(r"\r\n?|\n")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Contents of a table."""

    columns: tuple[str, ...]
    """First row, as it is written."""
    rows: tuple[tuple[str, ...], ...]
    """The others, each as long as `columns`; cells that are missing at the end of a row are empty."""
    literal: tuple[int, ...]
    """Rows (the first is 1) whose quotation marks are text here, while the public kit reads them as quoting."""
    damaged: tuple[int, ...]
    """Rows with bytes that are no UTF-8; U+FFFD stands for them."""


def read_cells(path: Path, number: str, filled: Sequence[str], others: Sequence[str] = ()) -> Cells:
    """Reads a table.

    The names say what tells a row of the table from a line of a quoted cell; their case does not matter.

    Args:
        path: the file, UTF-8.
        number: column that holds a number in every row.
        filled: columns that hold something in every row.
        others: further columns that every row reaches to, as far as the table has them.

    Raises:
        DataError: the file cannot be read; a row has more cells than the first row; a quoted cell holds what looks
            like a row.
    """
    text, damaged = _text(path)
    records = list(_with_quoting(text))
    if not records:
        raise DataError(f"{path} cannot be read as a tab-separated table: it is empty")
    columns = tuple(records.pop(0).cells)
    test = _RowTest(columns, number, filled, others)
    if not _is_quoted(text, records, test):
        records = list(_line_by_line(text, test, path))[1:]
    return Cells(
        columns=columns,
        rows=tuple(_padded(each.cells, len(columns), f"{path}, row {n}") for n, each in enumerate(records, 2)),
        literal=tuple(n for n, each in enumerate(records, 2) if each.literal),
        damaged=tuple(n for n, each in enumerate(records, 2) if damaged and _REPLACED in "".join(each.cells)),
    )


def _text(path: Path) -> tuple[str, bool]:
    """Content of a file, and whether bytes of it are no UTF-8, which `_REPLACED` then stands for."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read as a tab-separated table: {error}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} cannot be read as a tab-separated table: it is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", errors="replace"), True


def _padded(cells: list[str], width: int, where: str) -> tuple[str, ...]:
    if any(cells[width:]):
        raise DataError(
            f"{where} has {len(cells)} cells, but the first row has {width}; wanted at most as many: put quotation "
            "marks around a cell that holds a tab"
        )
    return tuple(cells[:width] + [""] * (width - len(cells)))


class _RowTest:
    """Tells rows of a table from lines of quoted cells."""

    def __init__(self, columns: Sequence[str], number: str, filled: Sequence[str], others: Sequence[str]) -> None:
        names = [name.strip().lower() for name in columns]
        self.width = len(columns)
        self._filled = [names.index(name.lower()) for name in filled if name.lower() in names]
        self._reached = max((names.index(n.lower()) for n in (*filled, *others) if n.lower() in names), default=0)
        self._number = names.index(number.lower()) if number.lower() in names else None

    def whole(self, cells: Sequence[str]) -> bool:
        """Whether the cells of a line, its quotation marks taken as text, are those of a row."""
        return (
            self.numbered(cells)
            and self._reached < len(cells) <= self.width
            and all(cells[place].strip() for place in self._filled)
        )

    def begun(self, cells: Sequence[str]) -> bool:
        """Whether they are a row, or the beginning of one whose last cell goes on in the next line."""
        return self.whole(cells) or (self.numbered(cells) and len(cells) > 1 and cells[-1].startswith('"'))

    def numbered(self, cells: Sequence[str]) -> bool:
        """Whether a number is in the place where rows have theirs."""
        return (
            self._number is not None
            and self._number < len(cells)
            and _NUMBER.fullmatch(cells[self._number].strip()) is not None
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """One row of a file."""

    cells: list[str]
    after: int
    """Where the next one begins."""
    spans: bool = False
    """Whether it goes on over the end of a line."""
    clean: bool = True
    """Whether every quotation mark is where a writer that quotes puts it."""
    literal: bool = False
    """Whether a mark that could open a quoted cell is text."""

    @property
    def blank(self) -> bool:
        """Whether it is no row."""
        return not any(cell.strip(" ") for cell in self.cells)


def _with_quoting(text: str) -> Iterator[_Record]:
    """The rows of a file as the public kit reads it, but for marks that are never closed: they are text."""
    position = 0
    while position < len(text):
        record = _record(text, position)
        position = record.after
        if not record.blank:
            yield record


def _is_quoted(text: str, records: Sequence[_Record], test: _RowTest) -> bool:
    """Whether the file is from a writer that quotes, so that all its marks mean what they mean to the kit.

    No such writer leaves a mark in a cell without quoting the cell, and each row has all its cells. A file from a
    writer that does not quote can look so by accident, but then every line of it is a row.
    """
    fits = all(each.clean and len(each.cells) == test.width and test.numbered(each.cells) for each in records)
    if not any(each.spans for each in records):
        return fits
    lines = (line.split("\t") for line in _LINE_END.split(text) if line.strip())
    next(lines)  # the first row
    return fits and not all(test.whole(cells) for cells in lines)


def _line_by_line(text: str, test: _RowTest, path: Path) -> Iterator[_Record]:
    """The rows of a file that quotes here and there, or not at all."""
    position = 0
    while position < len(text):
        record = _record(text, position)
        line, after = _line(text, position)
        plain = line.split("\t")
        if '"' in line and test.whole(plain) and _is_text(text, record, after, test, len(plain)):
            record = _Record(cells=[_unquoted(cell) for cell in plain], after=after, literal=True)
        elif record.spans:
            _check_swallowed(text[after : record.after], test, path, line)
        position = record.after
        if not record.blank:
            yield record


def _is_text(text: str, record: _Record, after_line: int, test: _RowTest, cells: int) -> bool:
    """Whether the marks of a line that is a whole row without quoting are text: with quoting it would take in the next
    row, or would have another number of cells than the first row."""
    if record.spans:
        return test.begun(_line(text, after_line)[0].split("\t"))
    return len(record.cells) != test.width == cells


def _line(text: str, position: int) -> tuple[str, int]:
    """The line that begins at `position`, and where the next one does."""
    end = _LINE_END.search(text, position)
    return (text[position:], len(text)) if end is None else (text[position : end.start()], end.end())


def _record(text: str, position: int) -> _Record:
    """The row that begins at `position`, with quoting."""
    line, after_line = _line(text, position)
    if '"' not in line:
        return _Record(cells=line.split("\t"), after=after_line)
    cells, clean, literal = [], True, False
    while True:
        match = _FIELD.match(text, position)
        assert match is not None, "the last alternative matches nothing as well"
        quoted, rest, plain = match.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"') + rest)
        clean = clean and not (rest if plain is None else '"' in plain)
        literal = literal or (quoted is None and plain.startswith('"'))
        position = match.end()
        if not text.startswith("\t", position):
            end = _LINE_END.match(text, position)
            after = len(text) if end is None else end.end()
            return _Record(cells=cells, after=after, spans=after > after_line, clean=clean, literal=literal)
        position += 1


def _unquoted(cell: str) -> str:
    """A cell of a line in which some other mark is never closed."""
    match = _QUOTED.fullmatch(cell)
    return cell if match is None else match[1].replace('""', '"')


def _check_swallowed(text: str, test: _RowTest, path: Path, first: str) -> None:
    """The lines that a quoted cell goes on over must not be rows."""
    position = 0
    while position < len(text):
        line, position = _line(text, position)
        if "\t" in line and test.whole(line.split("\t")):
            raise DataError(
                f"{path}: the quotation mark in the line {first[:60]!r} takes in the line {line[:60]!r}, which looks "
                "like a row of its own; close the mark, or put the cell between marks and double the one inside"
            )
