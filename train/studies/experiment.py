"""An experiment: variants of one small model, trained from several seeds, compared seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parrot_sys.evaluation.outcomes import ALL, Outcome, clusters, compare, difference_interval, mean_interval
from parrot_sys.evaluation.statistics import Paired, mean_margin
from parrot_sys.files import replace_text
from studies.measures import AVERAGE, Accuracy, Answers, Counts, accuracies, averages, covers, right_answers
from studies.pipeline import Pipeline, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Settings that every variant is trained with."""

    pipeline: Pipeline
    data: Step
    seed: int
    flags: tuple[str, ...] = ()
    """Further settings of `parrot train`."""
    data_flags: tuple[str, ...] = ()
    """Further settings of `parrot data build`, for variants with data of their own."""
    folder: str = ""
    """Put before the names of steps: `24/` for those on another data set than `data`."""

    @property
    def seeded(self) -> list[str]:
        """Settings of `parrot train` for this seed."""
        seed = str(self.seed)
        return ["--seed", seed, "--data.seed", seed, "--checkpoint.keep-last", "1", *self.flags]

    def name(self, step: str) -> str:
        """Name of a step of this seed."""
        return f"{self.folder}seed{self.seed}/{step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train."""

    name: str
    description: str
    evaluate: Callable[[Run], Step]
    """Trains and evaluates; steps that variants share are done once. Returns the evaluation."""
    rank: int = 0
    """Variants of a lower rank are trained first, from all seeds, so that a stop loses what matters least."""
    at: Mapping[str, Any] = field(default_factory=dict)
    """Place in the plot: name of an axis, or `line` -> value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Variants and what they show."""

    title: str
    about: str
    variants: tuple[Variant, ...]
    comparisons: tuple[tuple[str, str, str], ...]
    """(name, variant, variant it is compared with); differences are taken seed by seed."""
    file: str
    """Name of the kept result."""
    unit: str = "accuracy in percent by the likelihood of the options' texts"
    """Name of the figure that is compared."""
    chance: float | None = 25.0
    """Value that guessing gives."""
    measure: Callable[[Path], tuple[Accuracy, Counts]] = accuracies
    """Values and rows per part and language of an evaluation."""
    answers: Callable[[Path], Answers] = right_answers
    """The answers whose means `measure` gives."""
    scale: float = 100.0
    """Factor by which the mean of `answers` is multiplied to give the values of `measure`."""
    routes: Callable[[Path], Mapping[str, Any]] | None = None
    """Information in the routes of an evaluation, part by part, kept and reported beside `measure`."""
    plot: Callable[[Mapping[str, Any], Path], Mapping[str, str]] | None = None
    """Writes the plot of the whole from the kept result; returns file name -> caption."""


def experiment_content(experiment: Experiment, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The kept result of an experiment before its first run."""
    return {
        **provenance,
        "title": experiment.title,
        "about": experiment.about,
        "unit": experiment.unit,
        "chance": experiment.chance,
        "scale": experiment.scale,
        "variants": {variant.name: variant.description for variant in experiment.variants},
        "at": {variant.name: dict(variant.at) for variant in experiment.variants if variant.at},
        "results": {},
    }


def summarize(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], comparisons: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Mean and spread over seeds of every variant, and of the differences between variants.

    Args:
        results: variant -> seed -> record with `accuracy`.
        comparisons: of the experiment.

    Returns:
        `variants` and `differences`: name -> part -> language -> `mean`, `std` (sample, None for one seed), `seeds`
        (the values). Differences use the seeds that both variants have.
    """
    return {
        "variants": {
            name: _spread([record["accuracy"] for record in seeds.values()]) for name, seeds in results.items() if seeds
        },
        "differences": {
            name: _spread([_minus(results[a][s]["accuracy"], results[b][s]["accuracy"]) for s in common])
            for name, a, b in comparisons
            if (common := [seed for seed in results.get(a, {}) if seed in results.get(b, {})])
        },
    }


def compare_variants(experiment: Experiment, evaluations: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    """Intervals of the variants' means, and paired tests of the comparisons, from the answers to every question.

    Args:
        experiment: what is compared.
        evaluations: variant -> seed -> folder of its evaluation.

    Returns:
        `intervals`: variant -> part -> language (and means) -> ends; `tests`: comparison -> part -> language (and
        `all`, EXCEPT_EN) -> values of a `Paired`; `paired_intervals`: comparison -> part -> mean -> `difference`,
        `interval` (by pictures and seeds), `n`, `pictures`, `seeds`. The answers of all seeds count, and a picture is
        one cluster in all of them.
    """
    answers = {
        variant: _by_seed({seed: experiment.answers(folder) for seed, folder in seeds.items()})
        for variant, seeds in evaluations.items()
    }
    intervals = {
        variant: {
            part: {key: _interval(experiment, _chosen(runs, key)) for key in _keys(runs)}
            for part, runs in parts.items()
        }
        for variant, parts in answers.items()
    }
    tests: dict[str, Any] = {}
    paired: dict[str, Any] = {}
    for name, first, second in experiment.comparisons:
        theirs = answers.get(second, {})
        for part, mine in answers.get(first, {}).items():
            pairs = {key: (_chosen(mine, key), theirs.get(part, {})) for key in _keys(mine)}
            found = {key: test for key, each in pairs.items() if (test := compare(*each)).n}
            if found:
                tests.setdefault(name, {})[part] = {
                    ALL if key == AVERAGE else key: asdict(test) for key, test in found.items()
                }
                paired.setdefault(name, {})[part] = {
                    key: _difference(experiment, found[key], *pairs[key]) for key in averages(_languages(mine))
                }
    return {"intervals": intervals, "tests": tests, "paired_intervals": paired}


def _difference(experiment: Experiment, test: Paired, first: _Runs, second: _Runs) -> dict[str, Any]:
    ends = difference_interval(first, second)
    return {
        "difference": experiment.scale * test.difference,
        "interval": None if ends is None else [experiment.scale * end for end in ends],
        "n": test.n,
        "pictures": test.clusters,
        "seeds": len({seed for seed, _ in first} & {seed for seed, _ in second}),
    }


_Runs = dict[tuple[str, str], list[Outcome]]
"""(seed, language) -> outcomes."""


def _by_seed(seeds: Mapping[str, Answers]) -> dict[str, _Runs]:
    parts: dict[str, _Runs] = {}
    for seed, answers in seeds.items():
        for part, languages in answers.items():
            for language, outcomes in languages.items():
                parts.setdefault(part, {})[seed, language] = outcomes
    return parts


def _languages(runs: _Runs) -> list[str]:
    return list(dict.fromkeys(language for _, language in runs))


def _keys(runs: _Runs) -> list[str]:
    languages = _languages(runs)
    return [*languages, *averages(languages)]


def _chosen(runs: _Runs, key: str) -> _Runs:
    return {run: each for run, each in runs.items() if covers(key, run[1])}


def _interval(experiment: Experiment, runs: _Runs) -> tuple[float, float] | None:
    """Of the mean over seeds and languages; None where a mean has no interval."""
    if experiment.scale == 100:
        return mean_interval({" ".join(run): each for run, each in runs.items()})
    outcomes = [outcome for each in runs.values() for outcome in each]
    values = [float(outcome.value) for outcome in outcomes]
    mean, margin = fmean(values), mean_margin(values, clusters(outcomes))
    return (mean - margin, mean + margin) if math.isfinite(margin) else None


def _minus(first: Accuracy, second: Accuracy) -> Accuracy:
    return {part: {key: value - second[part][key] for key, value in row.items()} for part, row in first.items()}


def _spread(runs: Sequence[Accuracy]) -> dict[str, dict[str, dict[str, Any]]]:
    spread: dict[str, dict[str, dict[str, Any]]] = {}
    for part, row in runs[0].items():
        for language in row:
            values = [run[part][language] for run in runs]
            spread.setdefault(part, {})[language] = {
                "mean": fmean(values),
                "std": stdev(values) if len(values) > 1 else None,
                "seeds": values,
            }
    return spread


def cells_of(content: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(variant, seed) of everything that a result holds."""
    return {(variant, seed) for variant, seeds in content["results"].items() for seed in seeds}


def write_result(content: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON at once or not at all, so that a kept result is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
