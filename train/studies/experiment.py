"""An experiment: variants of one small model, trained from several seeds, compared seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parrot_sys.evaluation import plots
from parrot_sys.evaluation.answer_lengths import count_answers
from parrot_sys.evaluation.fonts import explain_numbers
from parrot_sys.evaluation.headlines import headlines, metric_of, outcomes_of
from parrot_sys.evaluation.markdown import PAIRED, paired_table
from parrot_sys.evaluation.outcomes import ALL, Outcome, clusters, compare, mean_interval
from parrot_sys.evaluation.report import load_scores
from parrot_sys.evaluation.results import read_score_files
from parrot_sys.evaluation.statistics import mean_margin
from parrot_sys.files import replace_text
from parrot_sys.markdown_tables import fixed, table
from studies.pipeline import Pipeline, Step
from studies.route_tables import routes_table

AVERAGE = "mean"
"""Key of the mean over languages, beside the languages."""
_PLUS_MINUS = "\u00b1"
_INTERVALS = (
    "Brackets hold 95% intervals over questions, where all answers about a picture (all languages, all seeds) count as "
    "one cluster: what other pictures might give. The standard deviation says what other seeds might give."
)
_PAIRED_COUNTS = (
    "first minus second, over the same questions; in brackets the questions where the first is larger : where the "
    "second is, and p of the paired test in which answers that share a picture change sides together. No p is "
    "corrected for the number of comparisons."
)

Accuracy = dict[str, dict[str, float]]
"""part -> language (and AVERAGE) -> percent (or another unit)."""
Answers = dict[str, dict[str, list[Outcome]]]
"""part -> language -> outcome of every question."""


def accuracies(evaluation: Path) -> tuple[Accuracy, dict[str, dict[str, int]]]:
    """(accuracy, rows) per part and language of an evaluation."""
    accuracy: Accuracy = {}
    counts: dict[str, dict[str, int]] = {}
    for part, routings in load_scores(evaluation).items():
        results = routings["model"]
        values = headlines(results)
        accuracy[part] = {**values, AVERAGE: fmean(values.values())}
        counts[part] = {language: r["scores"]["n"] for language, r in results.items()}
    return accuracy, counts


def right_answers(evaluation: Path) -> Answers:
    """Which questions an evaluation answers rightly, as `accuracies` counts them."""
    return {
        part: outcomes_of(routings["model"], metric_of(routings)) for part, routings in load_scores(evaluation).items()
    }


def answer_lengths(evaluation: Path) -> tuple[Accuracy, dict[str, dict[str, int]]]:
    """(words in an answer, answers) per suite and language of an evaluation with generated answers."""
    lengths: Accuracy = {}
    counts: dict[str, dict[str, int]] = {}
    for suite, languages in counted_words(evaluation).items():
        means = {language: fmean(each.value for each in answers) for language, answers in languages.items()}
        lengths[suite] = {**means, AVERAGE: fmean(means.values())}
        counts[suite] = {language: len(answers) for language, answers in languages.items()}
    return lengths, counts


def counted_words(evaluation: Path) -> Answers:
    """Words in every answer of an evaluation with generated answers."""
    found: Answers = {}
    for file in read_score_files(evaluation):
        found.setdefault(file.content["suite"], {})[file.content["language"]] = count_answers(file)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Settings that every variant is trained with."""

    pipeline: Pipeline
    data: Step
    seed: int
    flags: tuple[str, ...] = ()
    """Further settings of `parrot train`."""

    @property
    def seeded(self) -> list[str]:
        """Settings of `parrot train` for this seed."""
        seed = str(self.seed)
        return ["--seed", seed, "--data.seed", seed, "--checkpoint.keep-last", "1", *self.flags]

    def name(self, step: str) -> str:
        """Name of a step of this seed."""
        return f"seed{self.seed}/{step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train."""

    name: str
    description: str
    evaluate: Callable[[Run], Step]
    """Trains and evaluates; steps that variants share are done once. Returns the evaluation."""


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
    measure: Callable[[Path], tuple[Accuracy, dict[str, dict[str, int]]]] = accuracies
    """Values and rows per part and language of an evaluation."""
    answers: Callable[[Path], Answers] = right_answers
    """The answers whose means `measure` gives."""
    scale: float = 100.0
    """Factor by which the mean of `answers` is multiplied to give the values of `measure`."""
    routes: Callable[[Path], Mapping[str, Any]] | None = None
    """Information in the routes of an evaluation, part by part, kept and reported beside `measure`."""


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
        `intervals`: variant -> part -> language (and AVERAGE) -> ends; `tests`: comparison -> part -> language (and
        `all`) -> values of a `Paired`. The answers of all seeds count, and a picture is one cluster in all of them.
    """
    answers = {
        variant: _by_seed({seed: experiment.answers(folder) for seed, folder in seeds.items()})
        for variant, seeds in evaluations.items()
    }
    intervals = {
        variant: {
            part: {
                **{language: _interval(experiment, runs, language) for language in _languages(runs)},
                AVERAGE: _interval(experiment, runs, None),
            }
            for part, runs in parts.items()
        }
        for variant, parts in answers.items()
    }
    tests: dict[str, Any] = {}
    for name, first, second in experiment.comparisons:
        theirs = answers.get(second, {})
        for part, mine in answers.get(first, {}).items():
            found = {
                language: compare(
                    {run: each for run, each in mine.items() if language in (ALL, run[1])}, theirs.get(part, {})
                )
                for language in (*_languages(mine), ALL)
            }
            if tested := {language: asdict(test) for language, test in found.items() if test.n}:
                tests.setdefault(name, {})[part] = tested
    return {"intervals": intervals, "tests": tests}


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


def _interval(experiment: Experiment, runs: _Runs, language: str | None) -> tuple[float, float] | None:
    """Of the mean over seeds, and over languages where none is given; None where a mean has no interval."""
    chosen = {f"{seed} {name}": each for (seed, name), each in runs.items() if language in (None, name)}
    if experiment.scale == 100:
        return mean_interval(chosen)
    outcomes = [outcome for each in chosen.values() for outcome in each]
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


def write_result(content: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON at once or not at all, so that a kept result is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_report(content: Mapping[str, Any], folder: Path) -> Path:
    """report.md with one plot per part, from what the JSON holds; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    scale = content.get("scale", 100.0)
    seeds = max((len(runs) for runs in content["results"].values()), default=0)
    lines = [
        f"# {content['title']}",
        "",
        f"{content['about']} One data set serves all seeds; a seed decides initial weights and the order of the data.",
        "",
        f"{content['unit'].capitalize()}, mean {_PLUS_MINUS} sample standard deviation over at most {seeds} seeds"
        + ("." if content["chance"] is None else f"; guessing gives {fixed(content['chance'], 0)}.")
        + (f" {_INTERVALS}" if "intervals" in content["summary"] else ""),
        "",
        *[f"* **{name}**: {description}" for name, description in content["variants"].items()],
        "",
    ]
    summary = content["summary"]
    parts = list(next(iter(summary["variants"].values()), {}))
    if len(parts) > 1:
        plots.means_with_spread(
            {name: {part: row[part][AVERAGE]["seeds"] for part in parts} for name, row in summary["variants"].items()},
            chance=content["chance"],
            title=f"{content['unit'].capitalize()}, mean over languages",
            y_label=content["unit"],
            path=folder / "parts.png",
        )
        lines += ["![Mean over languages of each part](parts.png)", ""]
    for part in parts:
        rows = {name: parts[part] for name, parts in summary["variants"].items()}
        intervals = {name: parts.get(part, {}) for name, parts in summary.get("intervals", {}).items()}
        counts = next(iter(next(iter(content["results"].values())).values()))["n"][part]
        lines += [f"## {part} (n = {min(counts.values())} to {max(counts.values())} rows a language and seed)", ""]
        lines += [*_spread_table("variant", rows, intervals), ""]
        if lines_of_routes := routes_table(content["results"], part):
            lines += [*lines_of_routes, ""]
        differences = {name: parts[part] for name, parts in summary["differences"].items()}
        if differences:
            lines += ["Differences, taken seed by seed:", ""]
            lines += [*_spread_table("difference", differences), ""]
        tests = {name: found[part] for name, found in summary.get("tests", {}).items() if part in found}
        if tests:
            lines += [f"Question by question, all seeds: {PAIRED if scale == 100 else _PAIRED_COUNTS}", ""]
            lines += [*paired_table("comparison", tests, scale=scale), ""]
        legend = plots.means_with_spread(
            {name: {language: cell["seeds"] for language, cell in row.items()} for name, row in rows.items()},
            chance=content["chance"],
            title=f"{part}: {content['unit']}",
            y_label=content["unit"],
            path=folder / f"{part}.png",
        )
        lines += [f"![{content['unit'].capitalize()}, {part}]({part}.png)", ""]
        lines += [explain_numbers(legend), ""] if legend else []
    machine = {key: content[key] for key in ("device", "python", "versions", "commit")}
    lines += ["Made with: " + ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _spread_table(
    what: str,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]] | None = None,
) -> list[str]:
    languages = list(next(iter(rows.values())))
    body = []
    for name, row in rows.items():
        ends = {} if intervals is None else intervals.get(name, {})
        body.append([name, *(_spread_cell(cell, ends.get(language)) for language, cell in row.items())])
    return table([what, *languages], body)


def _spread_cell(cell: Mapping[str, Any], interval: Sequence[float] | None) -> str:
    spread = "" if cell["std"] is None else f" {_PLUS_MINUS} {fixed(cell['std'], 1)}"
    ends = "" if interval is None else f" [{fixed(interval[0], 1)}, {fixed(interval[1], 1)}]"
    return fixed(cell["mean"], 1) + spread + ends
