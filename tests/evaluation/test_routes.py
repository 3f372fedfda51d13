"""Routes of an evaluation by a rule: by language, by category, by neither; in report.json, report.md and the plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.evaluation.items import Item, Prediction, Routing
from parrot_sys.evaluation.main import evaluate
from parrot_sys.evaluation.report import ReportInput, build_report
from parrot_sys.evaluation.routes import measure_routes
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import picture, write_table

_CATEGORIES = ("animals", "food", "tools")
_LANGUAGES = ("en", "zh", "pt")


class Routed(Scripted):
    """Routes by a rule."""

    def __init__(self, expert: Callable[[Item], int]) -> None:
        super().__init__()
        self.expert = expert

    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        predictions = super().predict(items, routing)
        return [
            replace(prediction, experts=[0.3 * (e == self.expert(item)) for e in range(4)])
            for item, prediction in zip(items, predictions, strict=True)
        ]


def _questions() -> list[dict[str, Any]]:
    """Twelve questions about a picture each, four of a category, and each picture asked about twice."""
    return [
        {"index": 100 * twice + i, "question": f"{i}?", "A": "cat", "B": "dog", "answer": "A", "split": "style",
         "category": _CATEGORIES[i % 3], "image": picture((10 * i, 90, 9), (30 + i, 40))}
        for twice in (0, 1)
        for i in range(1, 13)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("expert", "language", "category", "usage"),
    [
        (lambda item: _LANGUAGES.index(item.table.language), math.log2(3), 0.0, "H(expert) 1.58 of 2.00 bits"),
        (lambda item: item.question.index % 100 % 3, 0.0, math.log2(3), "H(expert) 1.58 of 2.00 bits"),
        (lambda item: 2, 0.0, 0.0, "H(expert) 0.00 of 2.00 bits"),
    ],
)
def test_report_says_what_routes_tell(
    tmp_path: Path, expert: Callable[[Item], int], language: float, category: float, usage: str
) -> None:
    for each in _LANGUAGES:
        write_table(tmp_path / "data" / f"mmmb_{each}.tsv", _questions())
    evaluate(config(tmp_path / "data"), Routed(expert))
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report"))
    found = content["details"]["routes"]["style"]
    assert found["language"]["bits"] == pytest.approx(language)
    assert found["category"]["bits"] == pytest.approx(category)
    # twelve pictures: that each was asked about in three languages, twice, makes no more of them
    assert (found["language"]["n"], found["category"]["n"]) == (36, 12)
    assert found["language"]["p"] == (0.001 if language else 1.0)
    assert found["category"]["p"] < 0.01 if category else found["category"]["p"] == 1.0
    assert found["most"] == 2.0
    assert found["picture_entropy"] == 0.0
    assert 4 in found["dead"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Routes" in text
    assert f"{language:.3f} of 1.58" in text
    assert f"{usage}; dead experts: " in text


def test_no_routes() -> None:
    assert measure_routes({"en": {"scores": {}}}) == {}
    assert measure_routes({"en": {"routes": {}}}) == {}
    off = {"routes": {"picture": ["a"], "category": ["b"], "experts": [[0.0, 0.0]]}}
    assert measure_routes({"en": off}) == {}
