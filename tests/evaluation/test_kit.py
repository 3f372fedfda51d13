"""Files for the public kit: what it takes, what it refuses and why, and tables without answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_sys.evaluation.kit import KitFiles, write_kit_files
from parrot_sys.evaluation.main import evaluate, offers
from parrot_sys.evaluation.report import ReportInput, build_report
from parrot_sys.evaluation.tsv import read_table
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import picture, write_table

ROW: dict[str, Any] = {"index": 1, "question": "What is it?", "A": "cat", "B": "dog", "answer": "B"}
FILES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)  # each example writes its file anew


def _files(path: Path, rows: list[dict[str, Any]], answer: str = "B") -> KitFiles:
    table = read_table(write_table(path, rows))
    return write_kit_files(table, {q.index: answer for q in table.questions}, path.parent / f"m_{path.stem}")


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("t.tsv", [{**ROW, "history": "[]"}], "does not show earlier turns"),
        ("t.tsv", [{**ROW, "history": "[]"}, {**ROW, "index": 2, "image": None}], "1 rows have no picture"),
        ("t.tsv", [{"Index": 1, "question": "q", "A": "x", "B": "y", "answer": "A"}], "no column spelt index"),
        ("t.tsv", [{"index": 1, "question": "q", "A": "x", "C": "y", "answer": "A"}], "no column spelt B"),
        ("t.tsv", [{**ROW, "index": 1.0}, {**ROW, "index": 2.5e3}], "reads the index as 1.0, 2500.0"),
        ("mmbench_dev_en.tsv", [{**ROW, "index": 2**53 + 1}], r"beyond 2\^53, which the kit rounds"),
        ("mmbench_dev_en.tsv", [ROW, {**ROW, "index": 1_000_007}], "no row with the index 7 of a question"),
        ("t.tsv", [{**ROW, "question": "x" * 40_000}], "a cell has 40000 characters"),
    ],
)
def test_refused_tables_are_not_offered(tmp_path: Path, name: str, rows: list[dict[str, Any]], reason: str) -> None:
    stem = f"m_{Path(name).stem}"
    (tmp_path / f"{stem}.xlsx").write_text("of an earlier run")
    files = _files(tmp_path / name, rows)
    assert files.offered is None
    assert any(re.search(reason, each) for each in files.refusals)
    assert f"{name} is not for the public kit" in files.notes[0]
    assert not (tmp_path / f"{stem}.xlsx").exists()
    assert len(pd.read_csv(tmp_path / f"{stem}.tsv", sep="\t")) == len(rows)  # for people


def test_marks_that_the_kit_reads_otherwise(tmp_path: Path) -> None:
    text = "index\tquestion\tA\tB\tanswer\timage\n" + "".join(
        f"{n}\t{'q' if n % 2 else chr(34) + 'q'}\tx\ty\tA\t{picture()}\n" for n in range(1, 5)
    )
    (tmp_path / "t.tsv").write_text(text)
    table = read_table(tmp_path / "t.tsv")
    assert [q.index for q in table.questions] == [1, 2, 3, 4]
    files = write_kit_files(table, {q.index: "A" for q in table.questions}, tmp_path / "m_t")
    assert files.refusals == ("the kit reads other rows, for the quotation marks of row 3, 5",)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.tsv", [ROW, {**ROW, "index": 2, "question": "caf?"}])
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9"))
    table = read_table(path, keep_bad=True)
    files = write_kit_files(table, {1: "B", 2: ""}, tmp_path / "m_t")
    assert files.refusals == ("row 3 holds bytes that are no UTF-8, which the kit cannot read",)
    with pytest.raises(UnicodeDecodeError):
        pd.read_csv(path, sep="\t")


def test_words_that_the_kit_takes_for_nothing_are_counted(tmp_path: Path) -> None:
    rows = [{**ROW, "index": n, "A": word} for n, word in enumerate(["None", "NA", "cat", "n/a", "null"], 1)]
    files = _files(tmp_path / "t.tsv", rows, answer="NA")
    assert files.notes[0].startswith("t.tsv: 4 rows (index 1, 2, 4, 5) have a text that reads None, NA or the like")
    assert files.notes[1].startswith("t.tsv: 5 answers are empty or read None, NA or the like")
    kit = pd.read_excel(files.offered)
    assert kit["A"].isna().tolist() == [True, True, False, True, True]  # what the note says of the kit
    assert _files(tmp_path / "u.tsv", [ROW]).notes == ()


def test_columns_that_the_kit_reports_by_have_no_gaps(tmp_path: Path) -> None:
    rows = [{**ROW, "index": n, "split": None, "category": c} for n, c in enumerate(["x", None, "NA"], 1)]
    kit = pd.read_excel(_files(tmp_path / "t.tsv", rows).offered)
    assert "split" not in kit
    assert kit["category"].tolist() == ["x", "none", "none"]
    # what the kit does with them (vlmeval/dataset/utils/multiple_choice.py: report_acc) works
    assert sorted(set(kit["category"])) == ["none", "x"]


def test_a_table_with_the_name_of_a_published_one_is_told_apart(tmp_path: Path) -> None:
    assert _files(tmp_path / "mmmb_en.tsv", [ROW]).namesake
    assert not _files(tmp_path / "mine_en.tsv", [ROW]).namesake
    write_table(tmp_path / "data" / "mmmb_en.tsv", [ROW])
    *_, last = offers(evaluate(config(tmp_path / "data"), Scripted()), tmp_path / "out")
    assert last.startswith("Of MMMB_en the public kit downloads other tables")


@FILES
@given(
    options=st.lists(st.sampled_from(["", "1", "-2", "1.50", "007", "x"]), min_size=1, max_size=5),
    first=st.one_of(st.integers(0, 5), st.integers(2**53, 2**62)),
    answers=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=5, max_size=5),
)
def test_the_kit_reads_what_was_asked(tmp_path: Path, options: list[str], first: int, answers: list[str]) -> None:
    rows = [{**ROW, "index": first + n, "A": option} for n, option in enumerate(options)]
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    predictions = {q.index: answer for q, answer in zip(table.questions, answers, strict=False)}
    offered = write_kit_files(table, predictions, tmp_path / "m_t").offered
    assert offered is not None
    kit = pd.read_excel(offered)
    assert [int(index) for index in kit["index"]] == [q.index for q in table.questions]
    # (vlmeval/dataset/utils/multiple_choice.py: build_choices)
    shown = [{k: str(row[k]) for k in "AB" if not pd.isna(row[k])} for _, row in kit.iterrows()]
    assert shown == [dict(q.options) for q in table.questions]
    text = pd.read_csv(tmp_path / "m_t.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert text["prediction"].tolist() == list(predictions.values())


@pytest.mark.parametrize("column", [{}, {"answer": None}])
def test_tables_without_answers_write_the_file_to_hand_in(tmp_path: Path, column: dict[str, Any]) -> None:
    question = {key: value for key, value in ROW.items() if key != "answer"}
    rows = [{**question, **column, "index": n} for n in range(3)]
    write_table(tmp_path / "data" / "mmbench_test_en.tsv", rows)
    model = Scripted(answer=lambda item, routing: "AB"[item.question.index % 2])
    results = evaluate(config(tmp_path / "data", name="m"), model)
    file = tmp_path / "out" / "mmbench_test" / "model" / "m_mmbench_test_en.xlsx"
    kit = pd.read_excel(file)
    assert kit["prediction"].tolist() == ["A", "B", "A"]
    assert kit["index"].tolist() == [0, 1, 2]
    assert offers(results, tmp_path / "out") == [
        f"Predictions to hand in (mmbench_test_en has no answers to score): {file}"
    ]
    assert not list((tmp_path / "out").rglob("*.scores.json"))
    again = Scripted()
    evaluate(config(tmp_path / "data", name="m"), again)
    assert again.asked == []


def test_with_and_without_answers_in_one_run(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "a_en.tsv", [ROW])
    write_table(tmp_path / "data" / "b_en.tsv", [{key: value for key, value in ROW.items() if key != "answer"}])
    write_table(tmp_path / "data" / "c_en.tsv", [{**ROW, "history": "[]"}])
    results = evaluate(config(tmp_path / "data"), Scripted(answer=lambda item, routing: "B"))
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report"))
    assert {part: content[part] for part in ("a", "c")} == {"a": {"en": 100.0}, "c": {"en": 100.0}}
    assert "b" not in content
    assert any("c_en.tsv is not for the public kit" in note for note in content["details"]["notes"])
    first, second, third = offers(results, tmp_path / "out")
    assert first.startswith("Predictions for the public kit: ")
    assert second.startswith("Predictions to hand in (b_en has no answers to score): ")
    assert third == "Not for the public kit: c_en, as the kit does not show earlier turns"
    scores = json.loads(next((tmp_path / "out" / "c").rglob("*.scores.json")).read_text())
    assert scores["kit_file"] is None
