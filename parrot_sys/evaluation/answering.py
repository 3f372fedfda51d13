"""Asking a model the questions of a table: which cannot be asked, and the answers to the others.

A question is bad where the model cannot be asked it at all: its row lacks something, its text cannot be encoded or is
too long, its picture cannot be read. All of them are known before the first answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tqdm import tqdm

from parrot_sys.errors import DataError
from parrot_sys.evaluation.items import Item, Prediction, Predictor, Routing
from parrot_sys.evaluation.prompts import clean_answer
from parrot_sys.evaluation.store import PredictionStore
from parrot_sys.evaluation.tsv import QuestionSet

logger = logging.getLogger(__name__)

OnBadQuestion = Literal["error", "wrong"]
ADVICE = "; fix the table, or pass --on-bad-question wrong, which counts such questions as wrong"
_LISTED = 20
"""Bad questions of a table that a report lists."""

Problems = dict[int, str]
"""Index of a question -> why it cannot be asked."""


def find_problems(items: Sequence[Item], predictor: Predictor) -> Problems:
    """Questions that cannot be asked. The model does not run."""
    found = {}
    for item in tqdm(items, desc=f"checking {items[0].table.name}", unit="question", leave=False):
        if reason := problem(item, predictor):
            found[item.question.index] = reason
    return found


def problem(item: Item, predictor: Predictor) -> str:
    """Why a question cannot be asked; empty where it can."""
    return item.question.problem or item.problem or predictor.problem(item)


def located(table: QuestionSet, problems: Problems) -> list[str]:
    """Problems with the places of their questions."""
    return [f"{table.place(q)}: {problems[q.index]}" for q in table.questions if q.index in problems]


def bad_questions(table: QuestionSet, problems: Problems) -> list[dict[str, Any]]:
    """`row`, `index` and `reason` of each question that cannot be asked, for the score file."""
    return [
        {"row": q.row, "index": q.index, "reason": problems[q.index]} for q in table.questions if q.index in problems
    ]


def problem_notes(table: QuestionSet, problems: Problems) -> list[str]:
    """Sentences on bad questions for the report; they are logged as well."""
    if not problems:
        return []
    lines = ["row {row}, index {index}: {reason}".format(**each) for each in bad_questions(table, problems)]
    more = [f"and {len(lines) - _LISTED} more, see `bad_questions` in its .scores.json"] if len(lines) > _LISTED else []
    note = (
        f"{table.path.name}: {len(lines)} of {len(table.questions)} questions could not be asked and count as wrong: "
        f"{'; '.join([*lines[:_LISTED], *more])}."
    )
    logger.warning(note)
    return [note]


def answer(
    items: Sequence[Item],
    predictor: Predictor,
    store: PredictionStore,
    routing: Routing,
    batch_size: int,
    problems: Problems,
    on_bad: OnBadQuestion,
) -> dict[int, dict[str, Any]]:
    """Asks the model what the store does not hold yet.

    Args:
        items: questions of one table.
        predictor: the model.
        store: of their answers.
        routing: of the pictures.
        batch_size: questions answered together.
        problems: questions that are not asked; gains those that turn out bad only now.
        on_bad: `wrong` goes on after such a question.

    Returns:
        Index -> record of every item; of bad ones with an empty `prediction` and the `problem`.

    Raises:
        DataError: a question turns out bad, and `on_bad` is `error`.
    """
    good = [item for item in items if item.question.index not in problems]
    todo = [item for item in good if item.question.index not in store.records]
    known = len(good) - len(todo)
    name = items[0].table.name
    if known:
        logger.info("%s, routing %s: %d of %d answers are there", name, routing, known, len(items))
    with tqdm(total=len(good), initial=known, desc=f"{name} {routing}", unit="question") as bar:
        for batch in _batches(todo, batch_size):
            for item, prediction in _predict(batch, predictor, routing, problems, on_bad):
                store.add(_record(item, prediction))
            bar.update(len(batch))
    store.complete()
    return {
        item.question.index: _no_answer(item, problems)
        if item.question.index in problems
        else store.records[item.question.index]
        for item in items
    }


def _predict(
    batch: Sequence[Item], predictor: Predictor, routing: Routing, problems: Problems, on_bad: OnBadQuestion
) -> Iterator[tuple[Item, Prediction]]:
    """Answers to a batch; one by one where a question among them ends it."""
    try:
        yield from zip(batch, predictor.predict(batch, routing), strict=True)
    except DataError as error:
        if len(batch) > 1:
            for item in batch:
                yield from _predict([item], predictor, routing, problems, on_bad)
            return
        (item,) = batch
        if on_bad == "error":
            raise DataError(f"{item.table.place(item.question)}: {error}{ADVICE}") from error
        problems[item.question.index] = str(error)
        logger.warning("%s counts as wrong: %s", item.table.place(item.question), error)


def _no_answer(item: Item, problems: Problems) -> dict[str, Any]:
    index = item.question.index
    return {"index": index, "response": "", "prediction": "", "experts": [], "problem": problems[index]}


def _record(item: Item, prediction: Prediction) -> dict[str, Any]:
    return {
        "index": item.question.index,
        "response": prediction.response,
        "prediction": clean_answer(prediction.response, item.prompt),
        "experts": [round(weight, 6) for weight in prediction.experts],
        **({"option_scores": prediction.option_scores} if prediction.option_scores else {}),
        **({"option_tokens": prediction.option_tokens} if prediction.option_tokens else {}),
    }


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
