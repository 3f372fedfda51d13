"""Tables in many languages and scripts: all are reported, together and by script, and plots and tables hold them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.languages import by_script, file_suffix, in_order, script_of
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.items import Item, Prediction, Routing
from parrot_sys.evaluation.main import EvalConfig, evaluate, summary
from parrot_sys.evaluation.report import ReportInput, build_report
from parrot_sys.markdown_tables import language_table
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import picture, write_table

CATEGORIES = {
    "en": "animals",
    "zh": "\u52a8\u7269",
    "ar": "\u062d\u064a\u0648\u0627\u0646",
    "he": "\u05d7\u05d9\u05d5\u05ea",
    "fa": "\u062d\u06cc\u0648\u0627\u0646\u200c\u0647\u0627",
    "ur": "\u062c\u0627\u0646\u0648\u0631",
    "dv": "\u0796\u07a6\u0782\u07a6\u0788\u07a7\u0783\u07aa",
    "hi": "\u092a\u0936\u0941",
    "th": "\u0e2a\u0e31\u0e15\u0e27\u0e4c",
    "ko": "\ub3d9\ubb3c",
    "ta": "\u0bb5\u0bbf\u0bb2\u0b99\u0bcd\u0b95\u0bc1",
    "am": "\u12a5\u1295\u1235\u1233",
    "pt-BR": "animais",
    "zh-Hant": "\u52d5\u7269",
    "sr-Latn": "\u017eivotinje",
    "de": "Tiere",
    "pl": "zwierz\u0119ta",
    "ru": "\u0437\u0432\u0435\u0440\u0438",
    "el": "\u03b6\u03ce\u03b1",
    "vi": "\u0111\u1ed9ng v\u1eadt",
}


class Partly(Scripted):
    """Answers the first questions of a table right, in every language as many as its code has letters."""

    def predict(self, items: list[Item], routing: Routing) -> list[Prediction]:  # type: ignore[override]
        answers = []
        for item in items:
            right = item.question.index <= len(item.table.language) and routing == "model"
            answers.append(Prediction(response=item.question.answer if right else "no idea", experts=[0.5, 0.5]))
        return answers


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, (code, category) in enumerate(CATEGORIES.items()):
        rows: list[dict[str, Any]] = [
            {"index": index, "question": f"{category}?", "A": "x", "B": "y", "answer": "B", "category": category}
            for index in range(1, 9)
        ]
        for row in rows:
            row["image"] = picture((number, row["index"], 0), (30, 30))
        write_table(tmp_path / "data" / f"pets_{file_suffix(code)}.tsv", rows)
    return tmp_path / "data"


def test_every_language_is_reported(data: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(config(data, routing=("model", "other-language")), Partly())
        content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report"))
    accuracy = {code: 100 * len(code) / 8 for code in CATEGORIES}
    assert content["pets"] == pytest.approx(accuracy)
    assert list(content["pets"]) == in_order(CATEGORIES)
    group = content["details"]["languages"]["pets"]
    assert group["mean"] == pytest.approx(fmean(accuracy.values())) == content["details"]["average"]["pets"]
    assert (group["worst"]["language"], group["worst"]["accuracy"]) == ("en", 25.0)
    assert group["interval"][0] < group["mean"] < group["interval"][1]
    assert {script: held["languages"] for script, held in group["scripts"].items()} == by_script(in_order(CATEGORIES))
    for script, held in group["scripts"].items():
        wanted = fmean(accuracy[code] for code in CATEGORIES if script_of(code) == script)
        assert held["mean"] == pytest.approx(wanted), script
    report = tmp_path / "report"
    text = (report / "report.md").read_text(encoding="utf-8")
    for image in ("accuracy.png", "category_pets.png", "experts_pets.png"):
        assert f"]({image})" in text
        assert (report / image).stat().st_size > 5000
    # more languages than a page is wide: a row a language
    assert "| zh-Hant | 87.5 |" in text
    assert "Traditional Han" in text
    shown = summary(tmp_path / "out")
    assert f"| zh-Hant | 87.5 | {interval(content, 'zh-Hant')} |" in shown
    assert "worst language" in shown


def interval(content: dict[str, Any], code: str) -> str:
    low, high = content["details"]["intervals"]["pets"]["model"]["plain"][code]
    return f"[{low:.1f}, {high:.1f}]"


def test_languages_are_chosen_by_any_spelling_of_their_code(data: Path, tmp_path: Path) -> None:
    evaluate(config(data, languages=("pt_br", "CN", "sr-latn")), Partly())
    scores = sorted((tmp_path / "out").rglob("*.scores.json"))
    assert {json.loads(path.read_text())["language"] for path in scores} == {"pt-BR", "zh", "sr-Latn"}
    with pytest.raises(DataError, match="no table for language 'pt'; the given data has en, zh, ar, ru, am, de"):
        evaluate(config(data, languages=("pt",)), Partly())
    with pytest.raises(ConfigError, match="languages must be a BCP 47 code such as en, pt-BR or zh-Hant, got 'german'"):
        EvalConfig(checkpoint=tmp_path / "m", data=(data,), output=tmp_path / "o", languages=("german",))


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 60), rows=st.integers(1, 5))
def test_a_wide_table_is_turned_and_loses_nothing(columns: int, rows: int) -> None:
    header = ["what", *(f"c{column}" for column in range(columns))]
    cells = [[f"r{row}", *(f"{row}x{column}" for column in range(columns))] for row in range(rows)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in language_table(header, cells)]
    found = [lines[0], *lines[2:]]
    wanted = [header, *cells]
    assert found in (wanted, [list(row) for row in zip(*wanted, strict=True)])
    assert len(found[0]) <= 16
