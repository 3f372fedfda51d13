"""Plain and circular accuracy of one table, per split, category and l2-category, with baselines that need no model.

Plain: the share of rows answered rightly. Circular: the share of questions with every rotation answered rightly
(VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py). Both are always given, since mixing them up is a known trap.
All accuracies are percentages.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.evaluation.tsv import Question, iter_groups


def most_likely(scores: Mapping[str, float]) -> str:
    """The letter with the largest log-likelihood, the first of equal ones.

    Raises:
        CheckpointError: a number is not finite: the maximum would be whichever letter comes first.
    """
    if not all(map(math.isfinite, scores.values())):
        raise CheckpointError(
            f"no option is the most likely one, their log-likelihoods are {dict(scores)}: the checkpoint's weights are "
            "damaged, or its numbers are too large for the dtype (try --dtype float32)"
        )
    return max(scores, key=lambda letter: scores[letter])


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Accuracies over some rows of a table."""

    n: int
    """Rows, the denominator of `plain`."""
    plain: float
    n_questions: int
    """Questions (groups of rotated rows), the denominator of `circular`."""
    circular: float


def score_cell(questions: Sequence[Question], letters: Sequence[str | None]) -> Cell:
    """Both accuracies of `letters` (None and "Z" are wrong) over `questions`; NaN over no rows."""
    hits = [letter == question.answer for question, letter in zip(questions, letters, strict=True)]
    groups = [all(hits[row] for row in rows) for _, rows in iter_groups(questions)]
    return Cell(n=len(hits), plain=_percent(hits), n_questions=len(groups), circular=_percent(groups))


def score_table(
    questions: Sequence[Question], letters: Mapping[int, str | None], *, bad: Collection[int] = ()
) -> dict[str, Any]:
    """Everything that is reported of one table.

    Args:
        questions: rows of the table.
        letters: index -> extracted letter, "Z" or None, of every row.
        bad: indices of questions that could not be asked, among others; their letter is None.

    Returns:
        `n`, `plain`, `n_questions`, `circular` of all rows; the same per value under `by_split`, `by_category` and
        `by_l2_category`; counts: `refused` ("Z"), `unmatched` (None) and `bad_questions`; `baselines`.

    Raises:
        DataError: when a row has no prediction.
    """
    missing = [question.index for question in questions if question.index not in letters]
    if missing:
        raise DataError(
            f"{len(missing)} rows have no prediction, the first is index {missing[0]}; run the evaluation to its end"
        )
    chosen = [letters[question.index] for question in questions]
    return {
        **_as_dict(score_cell(questions, chosen)),
        **_counts(questions, chosen, bad),
        "by_split": _by(questions, chosen, lambda question: question.split),
        "by_category": _by(questions, chosen, lambda question: question.category),
        "by_l2_category": _by(questions, chosen, lambda question: question.l2_category),
        "baselines": baselines(questions),
    }


def score_beside(
    questions: Sequence[Question], letters: Mapping[int, str | None], rules: str, *, bad: Collection[int] = ()
) -> dict[str, Any]:
    """Accuracies and counts by other extraction rules, for `scores["beside"]`: `rules`, `plain`, `circular`, ..."""
    chosen = [letters[question.index] for question in questions]
    return {
        "rules": rules,
        **_as_dict(score_cell(questions, chosen)),
        **_counts(questions, chosen, bad),
    }


def _counts(questions: Sequence[Question], chosen: Sequence[str | None], bad: Collection[int]) -> dict[str, int]:
    held = sum(question.index in bad for question in questions)
    return {"refused": chosen.count("Z"), "unmatched": chosen.count(None) - held, "bad_questions": held}


def baselines(questions: Sequence[Question]) -> dict[str, Any]:
    """`random`: expected accuracies of guessing among a row's options; `majority`: of always the commonest letter."""
    chance = [1 / len(question.options) if question.options else 0.0 for question in questions]
    circular = [math.prod(chance[row] for row in rows) for _, rows in iter_groups(questions)]
    counts = Counter(question.answer for question in questions)
    # ties go to the earlier letter, so that the figure does not depend on row order
    letter = min(counts, key=lambda candidate: (-counts[candidate], candidate)) if counts else None
    majority = score_cell(questions, [letter] * len(questions))
    return {
        "random": {"plain": _percent(chance), "circular": _percent(circular)},
        "majority": {"plain": majority.plain, "circular": majority.circular, "letter": letter},
    }


def rows_by(questions: Sequence[Question], key: Callable[[Question], str]) -> dict[str, list[int]]:
    """Positions per value of `key`, values in order, without the empty one.

    A question belongs where its base row (index = group) is, so that no group is torn.
    """
    base = {question.group: key(question) for question in questions if question.index == question.group}
    rows: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        rows.setdefault(base.get(question.group, key(question)), []).append(position)
    return {value: chosen for value, chosen in sorted(rows.items()) if value}


def _by(
    questions: Sequence[Question], letters: Sequence[str | None], key: Callable[[Question], str]
) -> dict[str, dict[str, Any]]:
    """Cells per value of `key`."""
    return {
        value: _as_dict(score_cell([questions[i] for i in chosen], [letters[i] for i in chosen]))
        for value, chosen in rows_by(questions, key).items()
    }


def _as_dict(cell: Cell) -> dict[str, Any]:
    return {"n": cell.n, "plain": cell.plain, "n_questions": cell.n_questions, "circular": cell.circular}


def _percent(values: Sequence[float | bool]) -> float:
    return 100 * math.fsum(values) / len(values) if values else math.nan
