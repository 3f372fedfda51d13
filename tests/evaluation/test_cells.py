"""Tables with whatever people write into cells: every row comes back, with the text that the public kit shows."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_sys.data.decoding import load_image
from parrot_sys.errors import DataError
from parrot_sys.evaluation.cells import Cells, read_cells
from parrot_sys.evaluation.grid import kit_column, read_grid, whole_number
from parrot_sys.evaluation.tsv import QuestionSet, read_table
from tests.evaluation.tables import picture

COLUMNS = ["index", "question", "A", "B", "answer", "image"]
FILES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)  # each example writes its file anew
TEXTS = st.one_of(
    st.text(st.sampled_from("\"\t\n\r ab12.,'\ufeff"), max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    st.sampled_from(["", "None", "NA", "nan", "12", "1.50", "007", "True", '"', '""', "1\tq\ta\tb\tA", "\n7\t"]),
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


def _cells(path: Path) -> Cells:
    return read_cells(path, "index", ["question"], ["answer", "A"])


def _write(path: Path, rows: list[list[str]], end: str, mark: str, quoted: list[bool]) -> None:
    """A writer that quotes: what must be between marks, and what `quoted` says."""
    flags = iter(quoted)

    def cell(text: str) -> str:
        must = any(character in text for character in '"\t\r\n')
        return '"' + text.replace('"', '""') + '"' if must or next(flags, False) else text

    path.write_bytes((mark + end.join("\t".join(map(cell, row)) for row in rows) + end).encode())


def _rows(data: st.DataObject, order: list[str]) -> list[dict[str, str]]:
    count = data.draw(st.integers(1, 5), label="rows")
    return [
        {
            name: str(number) if name == "index" else "A" if name == "answer" else data.draw(TEXTS, label=name)
            for name in order
        }
        for number in range(1, count + 1)
    ]


@FILES
@given(
    data=st.data(),
    order=st.permutations(COLUMNS),
    end=ENDS,
    mark=st.sampled_from(["", "\ufeff"]),
    quoted=st.lists(st.booleans(), max_size=30),
)
def test_quoted_tables_are_read_as_the_kit_reads_them(
    tmp_path: Path, data: st.DataObject, order: list[str], end: str, mark: str, quoted: list[bool]
) -> None:
    rows = _rows(data, order)
    path = tmp_path / "t.tsv"
    _write(path, [order, *([row[name] for name in order] for row in rows)], end, mark, quoted)
    cells = _cells(path)
    kit = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert (
        [list(row) for row in cells.rows] == [[row[name] for name in order] for row in rows] == kit.to_numpy().tolist()
    )
    assert not cells.literal


@FILES
@given(data=st.data(), end=ENDS, order=st.permutations(COLUMNS))
def test_tables_without_quoting_keep_every_row(tmp_path: Path, data: st.DataObject, end: str, order: list[str]) -> None:
    """A cell may begin with a mark that nothing closes, or that another row's closes by accident."""
    cell = st.text(st.sampled_from('"" ab1'), max_size=4)
    rows = [
        {name: data.draw(cell) for name in COLUMNS} | {"index": str(number), "answer": "A"}
        for number in range(1, data.draw(st.integers(1, 6)) + 1)
    ]
    rows = [row | {"question": f"{row['question']}?"} for row in rows]
    path = tmp_path / "t.tsv"
    path.write_bytes(
        end.join("\t".join(row[name] for name in order) for row in ({n: n for n in order}, *rows)).encode()
    )
    cells = _cells(path)
    read = [dict(zip(order, row, strict=True)) for row in cells.rows]
    assert [row["index"] for row in read] == [row["index"] for row in rows]
    # marks that surround a cell may go, as in the kit; nothing else does
    assert [{k: v.replace('"', "") for k, v in row.items()} for row in read] == [
        {k: v.replace('"', "") for k, v in row.items()} for row in rows
    ]
    try:
        kit = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).to_numpy().tolist()
    except pd.errors.ParserError:
        kit = None
    assert bool(cells.literal) or [list(row) for row in cells.rows] == kit  # it is said where the kit reads otherwise


COLUMN = st.one_of(
    st.lists(st.one_of(st.integers(-(2**70), 2**70).map(str), st.just("")), min_size=1, max_size=6),
    st.lists(st.sampled_from(["1", "2.50", "007", "1e3", "", "-4", "inf"]), min_size=1, max_size=6),
    st.lists(st.sampled_from(["True", "false", "TRUE", "", "None"]), min_size=1, max_size=6),
    st.lists(TEXTS, min_size=1, max_size=6),
)


@FILES
@given(column=COLUMN)
def test_options_read_as_the_kit_shows_them(tmp_path: Path, column: list[str]) -> None:
    """Numbers with gaps as `1.0`; where the kit sees nothing, the words stay."""
    rows = [[str(n), "q?", cell, "other", "B", "1"] for n, cell in enumerate(column, 1)]
    _write(tmp_path / "t.tsv", [COLUMNS, *rows], "\n", "", [])
    frame = pd.read_csv(tmp_path / "t.tsv", sep="\t")
    wanted = [raw if pd.isna(shown) else f"{shown}" for raw, shown in zip(column, frame["A"], strict=True)]
    grid = read_grid(tmp_path / "t.tsv")
    assert [row["A"] for row in grid.rows] == wanted
    lost = [
        pd.isna(shown) and raw.strip() not in ("", "nan", "NaN") for raw, shown in zip(column, frame["A"], strict=True)
    ]
    assert [names == ("A",) for names in grid.unseen] == lost


def test_gaps_make_whole_numbers_decimals_as_in_the_kit() -> None:
    assert kit_column(["1", "2", ""]) == ["1.0", "2.0", None]
    assert kit_column(["1", "2", "3"]) == ["1", "2", "3"]
    assert kit_column(["1", "two", ""]) == ["1", "two", None]
    assert kit_column([]) == []


@given(number=st.integers(-(10**39), 10**39), ending=st.sampled_from(["", ".0", ".00", "."]))
def test_whole_numbers_are_exact(number: int, ending: str) -> None:
    assert whole_number(f" {number}{ending} ") == number


@pytest.mark.parametrize("cell", ["", "x", "1.5", "nan", "inf", "1e999999", "1_000", "\u0661", "1" * 5000])
def test_what_is_no_whole_number(cell: str) -> None:
    assert whole_number(cell) is None


def _table(path: Path, rows: list[dict[str, Any]]) -> QuestionSet:
    _write(path, [COLUMNS, *([str(row[name]) for name in COLUMNS] for row in rows)], "\n", "", [])
    return read_table(path)


@FILES
@given(first=st.integers(2**53, 2**80), step=st.integers(1, 3))
def test_large_indices_and_references_to_them_stay_apart(tmp_path: Path, first: int, step: int) -> None:
    row = {"question": "q?", "A": "x", "B": "y", "answer": "A"}
    rows = [
        {**row, "index": first, "image": picture((1, 2, 3))},
        {**row, "index": first + step, "image": picture((4, 5, 6))},
        {**row, "index": first + 7, "image": first + step},
    ]
    table = _table(tmp_path / "t.tsv", rows)
    assert [q.index for q in table.questions] == [first, first + step, first + 7]
    assert [q.image_key for q in table.questions] == [str(first), str(first + step), str(first + step)]
    assert table.questions[2].group == (first + 7) % 1_000_000


@FILES
@given(
    width=st.integers(1, 90),
    end=st.sampled_from(["\n", "\r\n", " "]),
    prefix=st.sampled_from(["", "data:image/png;base64,", "DATA:image/png;charset=x;base64,"]),
)
def test_pictures_over_lines_and_as_data_urls(tmp_path: Path, width: int, end: str, prefix: str) -> None:
    text = picture((10, 20, 30), (5, 4))
    cell = prefix + end.join(text[start : start + width] for start in range(0, len(text), width))
    row = {"index": 1, "question": "q?", "A": "x", "B": "y", "answer": "A", "image": cell}
    image = load_image(_table(tmp_path / "t.tsv", [row]).image("1"))
    assert (image.size, image.getpixel((0, 0))) == ((5, 4), (10, 20, 30))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("['" + base64.b64encode(b"x" * 60).decode() + "']", "a list of pictures"),
        ("data:image/png," + "x" * 80, "cannot be decoded"),
        ("x" * 60 + "\u2028" + "x" * 20, "cannot be read"),
    ],
)
def test_cells_that_hold_no_picture(tmp_path: Path, cell: str, reason: str) -> None:
    row = {"index": 1, "question": "q?", "A": "x", "B": "y", "answer": "A", "image": cell}
    with pytest.raises(DataError, match=rf"image of index 1 of .*t\.tsv .*{reason}"):
        load_image(_table(tmp_path / "t.tsv", [row]).image("1"))


HEAD = "index\tquestion\tA\tB\tanswer\timage\n"


@pytest.mark.parametrize(
    ("text", "rows", "literal"),
    [
        # closed by the mark of another row, and by none; each row begins where the line does
        ('1\t"a\tx\ty\tA\tp\n2\tb\tx\ty\tA\tp\n3\tc"\tx\ty\tA\tp\n', 3, (2,)),
        ('1\t"a\tx\ty\tA\tp\n2\tb\tx\ty\tA\tp\n', 2, (2,)),
        ('1\t"a\tx\ty\tA\tp\n2\t"b\tx\ty\tA\tp\n', 2, (2, 3)),
        # two marks in one line, which would swallow the tab between them
        ('1\t"a\tx"\ty\tA\tp\n2\tb\tx\ty\tA\tp\n', 2, (2,)),
        # both kinds of row in one file
        ('1\t"a\tx\ty\tA\tp\n2\t"two\nlines"\tx\ty\tA\tp\n', 2, (2,)),
        ('1\t"two\nlines"\tx\ty\tA\tp\n2\t"b\tx\ty\tA\tp\n', 2, (3,)),
        # no answers
        ('1\t"a\tx\ty\t\tp\n2\tb\tx\ty\t\tp\n3\tc"\tx\ty\t\tp\n', 3, (2,)),
        # a row without its last cell, blank lines, lines of nothing but tabs and spaces
        ("1\ta\tx\ty\tA\n\n  \n\t\t\t\n2\tb\tx\ty\tA\t\t\n", 2, ()),
    ],
)
def test_rows_of_untidy_files(tmp_path: Path, text: str, rows: int, literal: tuple[int, ...]) -> None:
    (tmp_path / "t.tsv").write_text(HEAD + text)
    cells = _cells(tmp_path / "t.tsv")
    assert [row[0] for row in cells.rows] == [str(number) for number in range(1, rows + 1)]
    assert cells.literal == literal


@pytest.mark.parametrize("numbers", [["-1", "-2", "-3"], ["1.0", "2.0", "3.0"], ["1.2E+06", "1.3e6", "7"]])
def test_marks_beside_any_number(tmp_path: Path, numbers: list[str]) -> None:
    text = [f"{number}\t{question}\tx\ty\tA\tp" for number, question in zip(numbers, ['"a', "b", 'c"'], strict=True)]
    (tmp_path / "t.tsv").write_text(HEAD + "\n".join(text))
    assert [row[0] for row in _cells(tmp_path / "t.tsv").rows] == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # neither reading fits: rows would be lost
        ('1\t"a\n2\tb\tx\ty\tA\tp\n3\tc"\tx\ty\tA\tp\n4\t"d\tx\ty\tA\tp\n', "looks like a row of its own"),
        ('1\t"two\n2\tlines"\tx\ty\tA\tp\n2\t"b\tx\ty\tA\tp\n', "looks like a row of its own"),
        ("1\ta\tx\ty\tA\tp\tmore\n", r"t\.tsv, row 2 has 7 cells, but the first row has 6"),
    ],
)
def test_rows_that_would_be_lost_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.tsv").write_text(HEAD + text)
    with pytest.raises(DataError, match=message):
        _cells(tmp_path / "t.tsv")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfei\0n\0"])
def test_files_that_are_no_tables(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.tsv cannot be read as a tab-separated table"):
        _cells(tmp_path / "t.tsv")
