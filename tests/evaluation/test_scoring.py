"""Plain and circular accuracy against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.evaluation.scoring import baselines, most_likely, score_cell, score_table
from parrot_sys.evaluation.tsv import Question


def question(index: int, answer: str, options: str = "ABCD", **more: Any) -> Question:
    return Question(
        index=index,
        question="q",
        options={letter: letter.lower() for letter in options},
        answer=answer,
        image_key="0",
        group=more.pop("group", index % 1_000_000),
        **more,
    )


# Question 1 has four rotations, question 2 two, question 3 one.
ROWS = [
    question(1, "A", category="x", l2_category="l"),
    question(2, "B", "AB", category="y", l2_category="l"),
    question(3, "B", category="x", l2_category="m"),
    question(1_000_001, "D", category="x", l2_category="l"),
    question(2_000_001, "C", category="x", l2_category="l"),
    question(3_000_001, "B", category="x", l2_category="l"),
    question(1_000_002, "A", "AB", category="y", l2_category="l"),
]
LETTERS = {1: "A", 2: "B", 3: None, 1_000_001: "D", 2_000_001: "C", 3_000_001: "Z", 1_000_002: "A"}


def test_by_hand() -> None:
    result = score_table(ROWS, LETTERS)
    assert (result["n"], result["n_questions"]) == (7, 3)
    assert result["plain"] == pytest.approx(500 / 7)
    assert result["circular"] == pytest.approx(100 / 3)  # only question 2 has all rows right
    assert (result["refused"], result["unmatched"]) == (1, 1)
    assert result["by_category"] == {
        "x": {"n": 5, "plain": pytest.approx(60.0), "n_questions": 2, "circular": 0.0},
        "y": {"n": 2, "plain": 100.0, "n_questions": 1, "circular": 100.0},
    }
    assert result["by_l2_category"]["l"] == {
        "n": 6,
        "plain": pytest.approx(500 / 6),
        "n_questions": 2,
        "circular": 50.0,
    }
    assert result["by_l2_category"]["m"] == {"n": 1, "plain": 0.0, "n_questions": 1, "circular": 0.0}
    assert result["by_split"] == {}


def test_baselines_by_hand() -> None:
    result = baselines(ROWS)
    assert result["random"]["plain"] == pytest.approx(100 * (5 / 4 + 2 / 2) / 7)
    assert result["random"]["circular"] == pytest.approx(100 * (1 / 256 + 1 / 4 + 1 / 4) / 3)
    # B is right three times; of the questions it answers only number 3 in every rotation
    assert result["majority"] == {"plain": pytest.approx(300 / 7), "circular": pytest.approx(100 / 3), "letter": "B"}


def test_majority_tie_goes_to_the_earlier_letter() -> None:
    assert baselines([question(1, "C"), question(2, "A")])["majority"]["letter"] == "A"


def test_yes_no_pairs_by_g_index() -> None:
    pairs = [question(10, "A", "AB", group=10), question(11, "B", "AB", group=10), question(12, "A", "AB", group=12)]
    cell = score_cell(pairs, ["A", "A", "A"])
    assert (cell.plain, cell.circular, cell.n, cell.n_questions) == (pytest.approx(200 / 3), 50.0, 3, 2)


def test_a_question_is_filed_under_its_base_row() -> None:
    rows = [
        question(1, "A", category="x"),
        question(1_000_001, "B", category="typo"),
        question(1_000_009, "A", category="z"),
    ]
    result = score_table(rows, {1: "A", 1_000_001: "B", 1_000_009: "B"})
    assert set(result["by_category"]) == {"x", "z"}
    assert result["by_category"]["x"]["n"] == 2
    assert result["circular"] == 50.0  # a group whose base row is absent still counts


def test_missing_prediction_is_an_error() -> None:
    with pytest.raises(DataError, match="1 rows have no prediction, the first is index 3"):
        score_table(ROWS, {index: letter for index, letter in LETTERS.items() if index != 3})


def test_nothing() -> None:
    cell = score_cell([], [])
    assert cell.n == cell.n_questions == 0
    assert math.isnan(cell.plain)
    assert math.isnan(cell.circular)


@given(
    scores=st.dictionaries(st.sampled_from("ABCDEF"), st.floats(-1e30, 0), min_size=1),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_the_most_likely_letter_is_one_of_numbers(scores: dict[str, float], bad: float) -> None:
    assert scores[most_likely(scores)] == max(scores.values())
    for letter in scores:
        with pytest.raises(CheckpointError, match="no option is the most likely one"):
            most_likely({**scores, letter: bad})
