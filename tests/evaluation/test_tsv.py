"""Reading MMMB-like tables: column variations, shared images, and errors that name file, row and reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.decoding import load_image
from parrot_sys.errors import DataError
from parrot_sys.evaluation.tsv import find_tables, iter_groups, read_table
from tests.evaluation.tables import picture, write_table

ROW: dict[str, Any] = {"index": 1, "question": "What is it?", "A": "cat", "B": "dog", "answer": "B"}


def test_all_columns(tmp_path: Path) -> None:
    row = {
        **ROW,
        "C": None,
        "D": "None",
        "hint": "look",
        "category": "animals",
        "l2-category": "mammals",
        "split": "style",
    }
    table = read_table(write_table(tmp_path / "mmmb_cn.tsv", [row]))
    (question,) = table.questions
    assert (table.name, table.suite, table.language) == ("MMMB_cn", "mmmb", "zh")
    # an option that reads "None" is an option; an empty cell is none
    assert question.options == {"A": "cat", "B": "dog", "D": "None"}
    assert (question.hint, question.category, question.l2_category, question.split) == (
        "look",
        "animals",
        "mammals",
        "style",
    )
    assert question.group == 1
    assert load_image(table.image(question.image_key)).size == (12, 9)
    assert load_image(table.image(question.image_key)).getpixel((0, 0)) == (200, 30, 30)


def test_column_variations(tmp_path: Path) -> None:
    row = {
        "Index": 7.0,
        "Question": "q",
        "E": "x",
        "F": 1.5,
        "Answer": "F",
        "Image": picture(),
        "L2_Category": "l2",
        "G_Index": 3.0,
    }
    path = tmp_path / "t.tsv"
    write_table(path, [row])
    text = path.read_text().split("\n")
    # the helper added its own `image` column first; drop it so that only `Image` is left
    path.write_text("\n".join("\t".join(line.split("\t")[1:]) for line in text if line) + "\n")
    table = read_table(path)
    (question,) = table.questions
    assert (question.index, question.group, question.l2_category) == (7, 3, "l2")
    assert question.options == {"E": "x", "F": "1.5"}
    assert (table.name, table.suite, table.language) == ("t", "t", "en")


def test_no_optional_columns_and_nan_cells(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "mmbench_dev_pt.tsv", [{**ROW, "hint": "nan", "split": "dev"}]))
    assert table.questions[0].hint is None
    assert (table.name, table.suite, table.language) == ("MMBench_dev_pt", "mmbench_dev", "pt")


def test_shared_images_are_stored_once(tmp_path: Path) -> None:
    rows = [
        {**ROW, "index": 1, "image": picture((1, 2, 3), (40, 40))},
        {**ROW, "index": 1_000_001, "image": 1},
        {**ROW, "index": 2, "image": "1.0"},
        {**ROW, "index": 3},
    ]
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    assert [q.image_key for q in table.questions] == ["1", "1", "1", "3"]
    assert set(table.images) == {"1", "3"}
    assert load_image(table.image("1")).getpixel((0, 0)) == (1, 2, 3)
    assert list(iter_groups(table.questions)) == [(1, [0, 1]), (2, [2]), (3, [3])]


def test_limited_keeps_rotations_together(tmp_path: Path) -> None:
    rows = [{**ROW, "index": i + r * 1_000_000} for r in range(2) for i in range(10)]
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    some = table.limited(4)
    assert [q.index for q in some.questions] == [0, 2, 5, 7, 1_000_000, 1_000_002, 1_000_005, 1_000_007]
    assert table.limited(10).questions == table.questions


def test_parts(tmp_path: Path) -> None:
    splits = ["style", "style", "concept", "style", None, "dev"]
    table = read_table(
        write_table(tmp_path / "mmmb_en.tsv", [{**ROW, "index": i, "split": s} for i, s in enumerate(splits)])
    )
    parts = {name: [q.index for q in questions] for name, questions in table.parts().items()}
    assert parts == {"style": [0, 1, 3], "concept": [2], "mmmb": [4, 5]}
    assert [q.index for q in table.limited(1).questions] == [0, 2, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROW, "index": "one"}], r"t\.tsv, row 2: index must be a whole number, got 'one'"),
        ([{**ROW, "index": 1.5}], "index must be a whole number, got '1.5'"),
        ([ROW, ROW], r"t\.tsv, row 3: index 1 occurs twice"),
        ([{**ROW, "answer": "C"}], r"row 2, index 1: answer must be one of the options A, B, got 'C'"),
        ([ROW, {**ROW, "index": 2, "answer": None}], "index 2: answer must be one of the options A, B, got ''"),
        ([{**ROW, "A": None, "B": None}], "no option column has text"),
        ([{**ROW, "question": " "}], "the question is empty"),
        ([{**ROW, "image": None}], "index 1: no image"),
        ([{**ROW, "image": 9}], "refers to row '9', which does not exist"),
        ([{**ROW, "image": "photo.png"}], "refers to row 'photo.png', which does not exist"),
        ([{**ROW, "index": 1, "image": 2}, {**ROW, "index": 2, "image": 1}], "row 2, which holds no image itself"),
        ([{"index": 1, "question": "q", "answer": "A"}], "has no option column"),
        ([{"index": 1, "A": "x", "answer": "A"}], "lacks the column 'question'"),
        ([{**ROW, "Question": "again"}], "has the column 'question' twice"),
    ],
)
def test_errors_name_file_row_and_reason(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(write_table(tmp_path / "t.tsv", rows))
    assert "t.tsv" in str(caught.value)


@pytest.mark.parametrize("cell", ["x" * 80, "aGVsbG8" * 20, picture()[:72]])
def test_broken_image(tmp_path: Path, cell: str) -> None:
    table = read_table(write_table(tmp_path / "t.tsv", [{**ROW, "index": 5, "image": cell}]))
    with pytest.raises(DataError, match=r"image of index 5 of .*t\.tsv cannot be (decoded|read)"):
        load_image(table.image("5"))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    write_table(tmp_path / "t.tsv", [ROW])
    (tmp_path / "empty.tsv").write_text((tmp_path / "t.tsv").read_text().split("\n")[0] + "\n")
    with pytest.raises(DataError, match=r"empty\.tsv has no rows"):
        read_table(tmp_path / "empty.tsv")
    (tmp_path / "nothing.tsv").write_text("")
    with pytest.raises(DataError, match=r"nothing\.tsv cannot be read"):
        read_table(tmp_path / "nothing.tsv")


def test_find_tables(tmp_path: Path) -> None:
    en = write_table(tmp_path / "style" / "mmmb_en.tsv", [ROW])
    cn = write_table(tmp_path / "concept" / "mmmb_cn.tsv", [ROW])
    assert find_tables([tmp_path]) == [cn, en]
    assert find_tables([en, tmp_path]) == [en, cn]
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void holds no \.tsv file"):
        find_tables([tmp_path / "void"])
    with pytest.raises(DataError, match="does not exist"):
        find_tables([tmp_path / "none.tsv"])


@pytest.mark.parametrize(
    ("stem", "suite", "language", "name"),
    [
        ("mmmb_en", "mmmb", "en", "MMMB_en"),
        ("MMMB_cn", "mmmb", "zh", "MMMB_cn"),
        ("mmbench_dev_zh", "mmbench_dev", "zh", "MMBench_dev_cn"),
        ("x_pt-br", "x", "pt-BR", "x_pt-br"),
        ("MMMB_zh-Hant", "mmmb", "zh-Hant", "MMMB_zh-Hant"),
        ("cvqa_min", "cvqa", "min", "cvqa_min"),
        ("maxm_iw", "maxm", "he", "maxm_iw"),
        ("mmbench", "mmbench", "en", "MMBench_dev_en"),  # none stated: English, as in the wrapper
        ("mmmu_pro", "mmmu_pro", "en", "mmmu_pro"),  # a language of ISO 639, but none with data in CLDR
        ("th", "th", "th", "th"),
    ],
)
def test_language_and_suite_of_a_table(tmp_path: Path, stem: str, suite: str, language: str, name: str) -> None:
    table = read_table(write_table(tmp_path / f"{stem}.tsv", [ROW]))
    assert (table.suite, table.language, table.name) == (suite, language, name)


def test_bytes_that_are_no_utf8_are_named_by_row(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [{**ROW, "index": i, "question": f"what {i}"} for i in range(1, 5)])
    path.write_bytes(path.read_bytes().replace(b"what 2", b"qu\xe9").replace(b"what 3", b"\xed\xa0\x80?"))
    with pytest.raises(
        DataError, match=r"row 3, index 2: the row holds bytes that are no UTF-8\n.*row 4, index 3: the row"
    ):
        read_table(path)
    table = read_table(path, keep_bad=True)
    assert [bool(question.problem) for question in table.questions] == [False, True, True, False]
    assert [question.question for question in table.questions][::3] == ["what 1", "what 4"]


def test_every_bad_index_is_named(tmp_path: Path) -> None:
    rows = [{**ROW, "index": index} for index in (1, "one", 1, None)]
    with pytest.raises(DataError) as caught:
        read_table(write_table(tmp_path / "t.tsv", rows), keep_bad=True)
    for row, reason in ((3, "a whole number, got 'one'"), (4, "index 1 occurs twice"), (5, "a whole number, got ''")):
        assert f"t.tsv, row {row}: " in str(caught.value)
        assert reason in str(caught.value)
