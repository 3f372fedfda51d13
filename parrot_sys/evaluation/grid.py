"""A benchmark table by column names, each cell as the public kit shows it.

The kit reads a column of numbers as numbers (`pandas.read_csv`), so that the options `1`, `2` and a gap are shown as
`1.0` and `2.0`, and `007` as `7`. Cells such as `None` or `NA` are empty to it; here they stay what they are, and
`Grid.unseen` names them, since a question may well ask for them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pandas as pd

from parrot_sys.errors import DataError
from parrot_sys.evaluation.cells import read_cells

REQUIRED = ("index", "question", "image")
_OPTIONAL = ("answer", "hint", "category", "l2-category", "split", "g_index", "history")
_TEXTS = ("question", "hint", "category", "l2-category", "split")
_INTEGER = re.compile(r"([+-]?\d{1,40})(?:\.0*)?", re.ASCII)
_LONGEST_NUMBER = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table."""

    columns: tuple[str, ...]
    """Names that this package uses: options in capitals, the others in small letters."""
    written: tuple[str, ...]
    """The same as the file spells them."""
    rows: tuple[dict[str, str], ...]
    """Column -> cell of each row, texts as the kit shows them."""
    unseen: tuple[tuple[str, ...], ...]
    """Of each row the question's texts that are words to people and empty to the kit, by column."""
    literal: tuple[int, ...]
    """Rows (the first line is 1) that the kit reads otherwise, see `cells.Cells`."""
    damaged: tuple[int, ...]
    """Rows with bytes that are no UTF-8."""
    odd_indices: tuple[str, ...]
    """Indices that the kit does not read as whole numbers, as it reads them."""

    @property
    def options(self) -> list[str]:
        """Columns of options, in order."""
        return sorted(filter(is_option, self.columns))


def read_grid(path: Path) -> Grid:
    """Reads a table.

    Raises:
        DataError: it cannot be read, lacks a column or has one twice.
    """
    cells = read_cells(path, "index", ("question",), ("answer", "A"))
    columns = _names(cells.columns, path)
    rows = [dict(zip(columns, row, strict=True)) for row in cells.rows]
    unseen: list[list[str]] = [[] for _ in rows]
    for name in columns:
        if name not in _TEXTS and not is_option(name):
            continue
        for number, shown in enumerate(kit_column([row[name] for row in rows])):
            if shown is not None:
                rows[number][name] = shown
            elif present(rows[number][name]) and (is_option(name) or name in ("question", "hint")):
                unseen[number].append(name)
    indices = kit_column([row["index"] for row in rows])
    return Grid(
        columns=columns,
        written=cells.columns,
        rows=tuple(rows),
        unseen=tuple(map(tuple, unseen)),
        literal=cells.literal,
        damaged=cells.damaged,
        odd_indices=tuple(str(index) for index in indices if index is None or not index.lstrip("+-").isdigit()),
    )


def kit_column(cells: Sequence[str]) -> list[str | None]:
    """The value that the public kit shows for each cell of a column, None where it sees nothing."""
    if not cells:
        return []
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    column = pd.read_csv(io.StringIO("\n".join(["x", *quoted])), sep="\t", skip_blank_lines=False)["x"]
    return [None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]


def is_option(name: str) -> bool:
    """Whether a column of this name holds options."""
    return re.fullmatch(r"[A-Z]", name) is not None


def present(cell: str) -> bool:
    """Whether a cell holds anything; some writers put `nan` for nothing."""
    return cell.strip() not in ("", "nan", "NaN")


def whole_number(cell: str) -> int | None:
    """The whole number in a cell, exactly, or None. A spreadsheet may have made 12 into 12.0, or into 1.2E+01."""
    text = cell.strip()
    if match := _INTEGER.fullmatch(text):
        return int(match[1])
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not text.isascii() or "_" in text:  # which Decimal reads, and no kit
        return None
    if not number.is_finite() or number.adjusted() > _LONGEST_NUMBER or number != number.to_integral_value():
        return None
    return int(number)


def _names(written: Sequence[str], path: Path) -> tuple[str, ...]:
    names: list[str] = []
    for name in map(_name, written):
        again = name in names
        if again and (name in (*REQUIRED, *_OPTIONAL) or is_option(name)):
            raise DataError(f"{path} has the column {name!r} twice; wanted once, got {', '.join(written)}")
        names.append(f"{name}.{len(names)}" if again else name)  # as pandas tells them apart
    if missing := [name for name in REQUIRED if name not in names]:
        raise DataError(
            f"{path} lacks the column {missing[0]!r}; wanted {', '.join(REQUIRED)}, `answer` unless only predictions "
            f"are wanted, and options A, B, ..., got {', '.join(written)}"
        )
    return tuple(names)


def _name(written: str) -> str:
    name = written.strip()
    if is_option(name):
        return name
    name = name.lower().replace("_", "-")
    return {"g-index": "g_index"}.get(name, name)
