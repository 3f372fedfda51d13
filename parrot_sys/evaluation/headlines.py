"""Headlines of a report: which accuracy a part is known by, what its answers are, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parrot_sys.evaluation.kit import is_circular
from parrot_sys.evaluation.outcomes import Interval, Outcome, by_question, mean_interval, read_outcomes

ROUTINGS = ("model", "off", "other-language")

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""part -> routing -> language -> what `runner.evaluate_table` returned, with the `scores` and `experts` of the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The kind of answers: the public kit scores generated ones to shown options, read by its rules, and no others."""

    short: str
    """Beside a figure."""
    answers: str
    """Sentences."""
    public_kit: bool
    """Whether the accuracies are what the public kit reports."""


_ANSWERS = {
    "generate": ("generated answers", "Answers are generated greedily, and rules find the option that they name."),
    "likelihood": ("likelihood of letters", "The answer is the option letter with the highest likelihood."),
    "text-likelihood": (
        "likelihood of texts",
        "The answer is the option whose text, with the end of the turn, has the highest likelihood: a product over "
        "tokens, which prefers short options.",
    ),
}
_HIDDEN = "The prompt does not show the options."
_NOT_THE_KITS = (
    "These accuracies are not what the public kit reports: it scores generated answers to questions with their options."
)


def measure_of(scores: Scores) -> Measure:
    """The kind of answers of an evaluation."""
    results = [r for routings in scores.values() for languages in routings.values() for r in languages.values()]
    settings = results[0]["settings"]
    mode, hidden = settings.get("mode", "generate"), settings.get("options") == "hidden"
    short, sentence = _ANSWERS[mode]
    sentences, kit = [sentence, *([_HIDDEN] if hidden else [])], False
    if mode != "generate" or hidden:
        sentences.append(_NOT_THE_KITS)
    elif results[0]["rules"] == "lenient":
        sentences.append("The rules are lenient, which no public kit uses.")
    elif any(result.get("kit_refusals") for result in results):
        sentences.append("The public kit does not score all of these tables; the notes say why.")
    else:
        kit = True
    return Measure(short=f"{short}, options hidden" if hidden else short, answers=" ".join(sentences), public_kit=kit)


def headline(dataset: str) -> str:
    """`circular` or `plain`: the accuracy that the public kit reports for a data set of this name."""
    return "circular" if is_circular(dataset) else "plain"


def metric_of(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The accuracy that a part is known by: `headline`, or `plain` where nothing is rotated and both are the same."""
    results = [result for languages in routings.values() for result in languages.values()]
    rotated = any(result["scores"]["n_questions"] < result["scores"]["n"] for result in results)
    return headline(results[0]["dataset"]) if rotated else "plain"


def outcomes_of(
    languages: Mapping[str, Mapping[str, Any]], metric: str, other: str | None = None
) -> dict[str, list[Outcome]]:
    """Language -> what `metric` counts: rows, or questions with all their rotations; without those scored earlier.

    Args:
        languages: language -> its result.
        metric: `plain` or `circular`.
        other: `normalised` or `beside`, for the answers by likelihood per token or by the other rules.
    """
    found = {}
    for language, result in languages.items():
        right = None if other is None else beside_scores(result, other).get("right")
        outcomes = None if other is not None and right is None else read_outcomes(result, right)
        if outcomes is not None:
            found[language] = by_question(outcomes) if metric == "circular" else outcomes
    return found


def beside_scores(result: Mapping[str, Any], other: str | None) -> Mapping[str, Any]:
    """Result of `outcomes.score_other` for `other`, or of `outcomes.measure` where that is None; may be empty."""
    if other == "beside":
        return result["scores"].get("beside") or {}
    return result if other is None else result.get(other) or {}


def average_interval(
    languages: Mapping[str, Mapping[str, Any]], metric: str, other: str | None = None
) -> Interval | None:
    """Interval of the mean over languages; None where an earlier version scored one. Arguments as in `outcomes_of`."""
    outcomes = outcomes_of(languages, metric, other)
    return mean_interval(outcomes) if len(outcomes) == len(languages) else None


def headlines(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Language -> the accuracy that its data set is known by, in percent."""
    return {language: result["scores"][headline(result["dataset"])] for language, result in languages.items()}


def held(languages: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Language -> what its result has under `key`, without those that have nothing."""
    return {language: result[key] for language, result in languages.items() if result.get(key)}
