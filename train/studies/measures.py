"""Figures of experiments from the folder of an evaluation, and the answers behind each figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from parrot_sys.evaluation.answer_lengths import count_answers, count_words, repeats_itself
from parrot_sys.evaluation.headlines import headlines, metric_of, outcomes_of
from parrot_sys.evaluation.outcomes import Outcome
from parrot_sys.evaluation.report import load_scores
from parrot_sys.evaluation.results import read_score_files

AVERAGE = "mean"
"""Key of the mean over languages, beside the languages."""
EXCEPT_EN = "mean but en"
"""Key of the mean over all languages but English, where there are others."""

Accuracy = dict[str, dict[str, float]]
"""part -> language (and AVERAGE, EXCEPT_EN) -> percent (or another unit)."""
Answers = dict[str, dict[str, list[Outcome]]]
"""part -> language -> outcome of every question."""
Counts = dict[str, dict[str, int]]
"""part -> language -> rows."""


def covers(key: str, language: str) -> bool:
    """Whether a language is among those that a figure is the mean over."""
    return key in (AVERAGE, language) or (key == EXCEPT_EN and language != "en")


def averages(languages: Sequence[str]) -> list[str]:
    """Keys of the means that these languages have."""
    return [AVERAGE, EXCEPT_EN] if "en" in languages and len(languages) > 1 else [AVERAGE]


def with_averages(values: Mapping[str, float]) -> dict[str, float]:
    """Value of each language, and the means over languages."""
    names = list(values)
    means = {key: fmean(value for name, value in values.items() if covers(key, name)) for key in averages(names)}
    return {**values, **means}


def accuracies(evaluation: Path) -> tuple[Accuracy, Counts]:
    """(accuracy, rows) per part and language of an evaluation."""
    accuracy: Accuracy = {}
    counts: Counts = {}
    for part, routings in load_scores(evaluation).items():
        results = routings["model"]
        accuracy[part] = with_averages(headlines(results))
        counts[part] = {language: r["scores"]["n"] for language, r in results.items()}
    return accuracy, counts


def right_answers(evaluation: Path) -> Answers:
    """Which questions an evaluation answers rightly, as `accuracies` counts them."""
    return {
        part: outcomes_of(routings["model"], metric_of(routings)) for part, routings in load_scores(evaluation).items()
    }


def answer_habits(evaluation: Path) -> tuple[Accuracy, Counts]:
    """(length and repetition, answers) per habit and language of an evaluation with generated answers."""
    return _means(habits_of_answers(evaluation))


def habits_of_answers(evaluation: Path) -> Answers:
    """Words of every answer, and 100 for an answer that repeats itself, so that a mean is in percent."""
    habits: Mapping[str, Callable[[str], int]] = {
        "words": count_words,
        "answers that repeat themselves (%)": lambda text: 100 * repeats_itself(text),
    }
    files = read_score_files(evaluation)
    return {
        habit: {file.content["language"]: count_answers(file, measure) for file in files}
        for habit, measure in habits.items()
    }


def _means(answers: Answers) -> tuple[Accuracy, Counts]:
    means: Accuracy = {}
    counts: Counts = {}
    for part, languages in answers.items():
        means[part] = with_averages({name: fmean(each.value for each in held) for name, held in languages.items()})
        counts[part] = {name: len(held) for name, held in languages.items()}
    return means, counts
