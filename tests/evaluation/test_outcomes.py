"""What a score file keeps of every row: pictures that are the same, clusters over languages, likelihood per token."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.evaluation.main import evaluate
from parrot_sys.evaluation.outcomes import (
    Outcome,
    by_question,
    clusters,
    compare,
    mean_interval,
    normalised,
    picture_digests,
    read_outcomes,
)
from parrot_sys.evaluation.report import load_scores
from parrot_sys.evaluation.tsv import Question
from tests.evaluation.scripted import Scripted, config


def outcome(index: int, value: int, picture: str | None = None, group: int | None = None) -> Outcome:
    return Outcome(index=index, group=index if group is None else group, picture=picture, value=value)


@settings(max_examples=40, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), other=st.binary(min_size=1, max_size=200))
def test_the_same_picture_has_the_same_digest_however_it_is_written(content: bytes, other: bytes) -> None:
    text = base64.b64encode(content).decode()
    lines = "\n".join(text[start : start + 20] for start in range(0, len(text), 20))
    cells = {"1": text, "2": lines, "3": f"data:image/png;base64,{text}", "4": base64.b64encode(other).decode()}
    digests = picture_digests(cells)
    assert digests["1"] == digests["2"] == digests["3"]
    assert (digests["1"] == digests["4"]) == (content == other)
    assert len(set(picture_digests({"1": "no base64!", "2": "nor this?"}).values())) == 2


def test_score_files_hold_every_row_with_its_cluster(three_languages: Path) -> None:
    """All questions of the tables share one picture: one cluster, so that nothing can be said about others."""
    evaluate(config(three_languages), Scripted())
    parts = load_scores(three_languages.parent / "out")
    english = read_outcomes(parts["style"]["model"]["en"])
    assert english is not None
    assert [(each.index, each.group, each.value) for each in english] == [(1, 1, 1), (2, 2, 1), (1_000_001, 1, 1)]
    assert len({each.picture for each in english}) == 1
    turkish = read_outcomes(parts["style"]["model"]["pt"])
    assert turkish is not None
    assert {each.picture for each in turkish} == {each.picture for each in english}
    assert parts["style"]["model"]["en"]["intervals"]["plain"] == [0.0, 100.0]
    assert set(parts["style"]["model"]["en"]["intervals"]["by_category"]) == {"x", "y"}
    assert read_outcomes({"scores": {}}) is None


def test_interval_over_languages_counts_a_picture_once() -> None:
    values = [1, 1, 0, 1, 1, 0, 1, 1]
    one = {"en": [outcome(i, value, f"picture {i}") for i, value in enumerate(values)]}
    six = dict.fromkeys(("en", "zh", "pt", "ar", "tr", "ru"), one["en"])
    assert mean_interval(six) == pytest.approx(mean_interval(one))
    # other pictures in every language, and other questions: six times as many answers
    apart = {
        language: [outcome(i + 10 * number, value, f"{language} {i}") for i, value in enumerate(values)]
        for number, language in enumerate(six)
    }
    narrow, wide = mean_interval(apart), mean_interval(six)
    assert narrow is not None
    assert wide is not None
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])
    assert mean_interval({}) is None


def test_questions_without_pictures_are_clustered_as_translations() -> None:
    rows = [outcome(1, 1), outcome(1, 0), outcome(2, 1), outcome(3, 1, "a"), outcome(4, 1, "a")]
    numbers = clusters(rows).tolist()
    assert numbers == [0, 0, 1, 2, 2]


def test_a_question_is_right_where_its_rotations_are() -> None:
    rows = [
        outcome(1, 1, group=1),
        outcome(1_000_001, 0, group=1),
        outcome(2, 1, group=2),
        outcome(1_000_002, 1, group=2),
    ]
    assert [(each.group, each.value) for each in by_question(rows)] == [(1, 0), (2, 1)]


def test_comparison_is_over_the_rows_that_both_hold() -> None:
    first = {"en": [outcome(i, 1, f"p{i}") for i in range(8)], "zh": [outcome(0, 1, "p0")]}
    second = {"en": [outcome(i, int(i > 5), f"p{i}") for i in range(2, 9)]}
    result = compare(first, second)
    assert (result.n, result.first_only, result.second_only, result.clusters) == (6, 4, 0, 6)
    assert result.p == pytest.approx(2 / 2**4)


def test_likelihood_per_token_by_hand() -> None:
    questions = [
        Question(index=i, question="q", options={"A": "a", "B": "b c d"}, answer="B", image_key=None, group=i)
        for i in (1, 2)
    ]
    records = {
        1: {"option_scores": {"A": -3.0, "B": -4.0}, "option_tokens": {"A": 2, "B": 4}},  # -1.5 and -1: B
        2: {"option_scores": {"A": -3.0, "B": -9.0}, "option_tokens": {"A": 2, "B": 4}},  # -1.5 and -2.25: A
    }
    result = normalised(questions, records, {})
    assert result is not None
    assert (result["plain"], result["circular"]) == (50.0, 50.0)
    assert set(result["intervals"]) == {"plain", "circular"}
    assert result["right"] == [1, 0]
    unasked = normalised(questions, {**records, 1: {"problem": "the picture is damaged"}}, {})
    assert unasked is not None
    assert (unasked["plain"], unasked["right"]) == (0.0, [0, 0])
    del records[2]["option_tokens"]  # answered by an earlier version
    assert normalised(questions, records, {}) is None
    assert normalised([], {}, {}) is None
