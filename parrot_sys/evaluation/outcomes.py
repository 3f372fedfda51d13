"""Which rows were answered rightly, kept beside the scores of a table: what intervals and paired tests are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parrot_sys.evaluation.scoring import most_likely, rows_by, score_cell
from parrot_sys.evaluation.statistics import Paired, accuracy_interval, join_clusters, paired_test, two_way_margin
from parrot_sys.evaluation.tsv import Question, picture_bytes

Interval = tuple[float, float]
METRICS = ("plain", "circular")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One answer."""

    index: int
    group: int
    """The question that its row is a rotation of; the same in all languages of a benchmark."""
    picture: str | None
    """Digest; the same wherever the picture is."""
    value: int
    """1 for right and 0 for wrong, or a count such as that of its words."""

    @property
    def shared(self) -> list[tuple[str, Any]]:
        """Keys that it may share with other answers, which then depend on it."""
        pictures = [] if self.picture is None else [("picture", self.picture)]
        return [("question", self.group), *pictures]


def picture_digests(images: Mapping[str, str]) -> dict[str, str]:
    """Key of a table's picture -> digest of its bytes, so that line breaks in base64 make no other picture."""
    digests = {}
    for key, cell in images.items():
        try:
            content = picture_bytes(cell)
        except ValueError:
            content = cell.encode()
        digests[key] = hashlib.sha256(content).hexdigest()[:16]
    return digests


def measure(
    questions: Sequence[Question], letters: Mapping[int, str | None], images: Mapping[str, str]
) -> dict[str, Any]:
    """Figures reported beside the scores of a part.

    Args:
        questions: rows of the part.
        letters: index -> extracted letter of every row.
        images: of the table.

    Returns:
        `rows`: columns `index`, `group`, `picture`, `right`; `intervals`: `plain` and `circular` 95% intervals in
        percent, and the same per value under `by_category` and `by_l2_category`.
    """
    digests = picture_digests({q.image_key: images[q.image_key] for q in questions if q.image_key is not None})
    outcomes = [
        Outcome(
            index=question.index,
            group=question.group,
            picture=None if question.image_key is None else digests[question.image_key],
            value=int(letters[question.index] == question.answer),
        )
        for question in questions
    ]
    keys = {"by_category": lambda q: q.category, "by_l2_category": lambda q: q.l2_category}
    return {
        "rows": {
            "index": [outcome.index for outcome in outcomes],
            "group": [outcome.group for outcome in outcomes],
            "picture": [outcome.picture for outcome in outcomes],
            "right": [outcome.value for outcome in outcomes],
        },
        "intervals": {
            **_intervals(outcomes),
            **{
                name: {
                    value: _intervals([outcomes[row] for row in rows])
                    for value, rows in rows_by(questions, key).items()
                }
                for name, key in keys.items()
            },
        },
    }


def score_other(
    questions: Sequence[Question], letters: Mapping[int, str | None], images: Mapping[str, str]
) -> dict[str, Any]:
    """Accuracies of other letters than those of `measure`, to be shown beside these.

    Returns:
        `plain`, `circular`, their `intervals`, and the column `right` beside the columns of `rows`.
    """
    cell, measured = score_cell(questions, [letters[q.index] for q in questions]), measure(questions, letters, images)
    return {
        "plain": cell.plain,
        "circular": cell.circular,
        "intervals": {name: measured["intervals"][name] for name in METRICS},
        "right": measured["rows"]["right"],
    }


def normalised(
    questions: Sequence[Question], records: Mapping[int, Mapping[str, Any]], images: Mapping[str, str]
) -> dict[str, Any] | None:
    """`score_other` of the likelihood per token, beside the plain one, which prefers short options.

    Args:
        questions: rows of the part.
        records: index -> record of the answer, with `option_scores` and `option_tokens`.
        images: of the table.

    Returns:
        None where a record holds no numbers of tokens.
    """
    asked = [question for question in questions if "problem" not in records[question.index]]
    if not asked or not all("option_tokens" in records[question.index] for question in asked):
        return None
    letters: dict[int, str | None] = dict.fromkeys(question.index for question in questions)
    for question in asked:
        record = records[question.index]
        means = {letter: score / record["option_tokens"][letter] for letter, score in record["option_scores"].items()}
        letters[question.index] = most_likely(means)
    return score_other(questions, letters, images)


def read_outcomes(part: Mapping[str, Any], right: Sequence[int] | None = None) -> list[Outcome] | None:
    """Answers of a part of a score file; None where an earlier version wrote it, without its rows.

    Args:
        part: of the file.
        right: another column than that of the rows, from `score_other`.
    """
    rows = part.get("rows")
    if rows is None:
        return None
    columns = rows["index"], rows["group"], rows["picture"], rows["right"] if right is None else right
    return [
        Outcome(index=index, group=group, picture=picture, value=value)
        for index, group, picture, value in zip(*columns, strict=True)
    ]


def by_question(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome for each question: right where every rotation is (circular accuracy)."""
    rotations: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        rotations.setdefault(outcome.group, []).append(outcome)
    return [
        Outcome(index=group, group=group, picture=rows[0].picture, value=min(row.value for row in rows))
        for group, rows in rotations.items()
    ]


def clusters(outcomes: Iterable[Outcome]) -> NDArray[np.int64]:
    """Number of each answer's cluster: answers about one picture, or to one question, depend on each other."""
    return join_clusters(outcome.shared for outcome in outcomes)


def mean_interval(languages: Mapping[str, Sequence[Outcome]]) -> Interval | None:
    """95% interval in percent of the unweighted mean over languages, clustered across them."""
    held = [outcomes for outcomes in languages.values() if outcomes]
    everything = [outcome for outcomes in held for outcome in outcomes]
    strata = [number for number, outcomes in enumerate(held) for _ in outcomes]
    return accuracy_interval([outcome.value for outcome in everything], clusters(everything), strata)


def compare(first: Mapping[Any, Sequence[Outcome]], second: Mapping[Any, Sequence[Outcome]]) -> Paired:
    """Paired test over the rows that both hold.

    Args:
        first: outcomes of one model by language (or language and seed).
        second: of the other model.
    """
    pairs = _pairs(first, second)
    return paired_test(
        [outcome.value for _, outcome, _ in pairs],
        [value for _, _, value in pairs],
        clusters(outcome for _, outcome, _ in pairs),
    )


def difference_interval(
    first: Mapping[tuple[str, str], Sequence[Outcome]], second: Mapping[tuple[str, str], Sequence[Outcome]]
) -> Interval | None:
    """95% interval of the mean of first minus second over the rows that both hold, by pictures and by seeds.

    Args:
        first: outcomes of one model by seed and language.
        second: of the other model.

    Returns:
        None where nothing shows how far the difference varies: no rows, or a single picture.
    """
    pairs = _pairs(first, second)
    values = [float(outcome.value - value) for _, outcome, value in pairs]
    seeds = join_clusters([(seed,) for (seed, _), _, _ in pairs])
    margin = two_way_margin(values, clusters(outcome for _, outcome, _ in pairs), seeds) if values else math.inf
    mean = sum(values) / max(1, len(values))
    return (mean - margin, mean + margin) if math.isfinite(margin) else None


def _pairs(
    first: Mapping[Any, Sequence[Outcome]], second: Mapping[Any, Sequence[Outcome]]
) -> list[tuple[Any, Outcome, int]]:
    """(key, outcome of the first, value of the second) of the rows that both hold."""
    pairs: list[tuple[Any, Outcome, int]] = []
    for key in first:
        values = {outcome.index: outcome.value for outcome in second.get(key, ())}
        pairs += [(key, outcome, values[outcome.index]) for outcome in first[key] if outcome.index in values]
    return pairs


ALL = "all"
"""Key of the comparison over all languages, beside the languages."""


def compare_languages(
    first: Mapping[str, Sequence[Outcome]], second: Mapping[str, Sequence[Outcome]]
) -> dict[str, dict[str, Any]]:
    """Paired tests of each language that both hold, and over all of them, as plain values for JSON."""
    shared = [language for language in first if language in second]
    tests = {language: compare({language: first[language]}, second) for language in shared}
    if len(shared) > 1:
        tests[ALL] = compare({language: first[language] for language in shared}, second)
    return {key: {**asdict(test), "discordant": test.discordant} for key, test in tests.items() if test.n}


def _intervals(outcomes: Sequence[Outcome]) -> dict[str, Interval | None]:
    questions = by_question(outcomes)
    return {
        "plain": accuracy_interval([o.value for o in outcomes], clusters(outcomes)),
        "circular": accuracy_interval([o.value for o in questions], clusters(questions)),
    }
