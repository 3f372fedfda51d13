"""An experiment: variants of one small model, trained from several seeds, compared seed by seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parrot_sys.evaluation import plots
from parrot_sys.evaluation.answer_lengths import count_words, read_answers
from parrot_sys.evaluation.markdown import table
from parrot_sys.evaluation.pipeline import Pipeline, Step
from parrot_sys.evaluation.report import headline, load_scores
from parrot_sys.evaluation.results import read_score_files
from parrot_sys.files import replace_text

AVERAGE = "mean"
"""Key of the mean over languages, beside the languages."""
_PLUS_MINUS = "\u00b1"

Accuracy = dict[str, dict[str, float]]
"""part -> language (and AVERAGE) -> percent (or another unit)."""


def accuracies(evaluation: Path) -> tuple[Accuracy, dict[str, dict[str, int]]]:
    """(accuracy, rows) per part and language of an evaluation."""
    accuracy: Accuracy = {}
    counts: dict[str, dict[str, int]] = {}
    for part, routings in load_scores(evaluation).items():
        results = routings["model"]
        values = {language: r["scores"][headline(r["dataset"])] for language, r in results.items()}
        accuracy[part] = {**values, AVERAGE: fmean(values.values())}
        counts[part] = {language: r["scores"]["n"] for language, r in results.items()}
    return accuracy, counts


def answer_lengths(evaluation: Path) -> tuple[Accuracy, dict[str, dict[str, int]]]:
    """(words in an answer, answers) per suite and language of an evaluation with generated answers."""
    lengths: Accuracy = {}
    counts: dict[str, dict[str, int]] = {}
    for file in read_score_files(evaluation):
        answers = read_answers(file).values()
        suite, language = file.content["suite"], file.content["language"]
        lengths.setdefault(suite, {})[language] = fmean(count_words(answer) for answer in answers)
        counts.setdefault(suite, {})[language] = len(answers)
    return {suite: {**row, AVERAGE: fmean(row.values())} for suite, row in lengths.items()}, counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What every variant is trained with."""

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
    unit: str = "accuracy in percent"
    """What is compared."""
    chance: float | None = 25.0
    """What guessing gives."""
    measure: Callable[[Path], tuple[Accuracy, dict[str, dict[str, int]]]] = accuracies
    """Values and rows per part and language of an evaluation."""


def experiment_content(experiment: Experiment, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The kept result of an experiment before its first run."""
    return {
        **provenance,
        "title": experiment.title,
        "about": experiment.about,
        "unit": experiment.unit,
        "chance": experiment.chance,
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
    seeds = max((len(runs) for runs in content["results"].values()), default=0)
    lines = [
        f"# {content['title']}",
        "",
        f"{content['about']} One data set serves all seeds; a seed decides initial weights and the order of the data.",
        "",
        f"{content['unit'].capitalize()}, mean {_PLUS_MINUS} sample standard deviation over at most {seeds} seeds"
        + ("." if content["chance"] is None else f"; guessing gives {content['chance']:.0f}."),
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
    for part in next(iter(summary["variants"].values()), {}):
        rows = {name: parts[part] for name, parts in summary["variants"].items()}
        counts = next(iter(next(iter(content["results"].values())).values()))["n"][part]
        lines += [f"## {part} (n = {min(counts.values())} to {max(counts.values())} rows a language and seed)", ""]
        lines += [*_spread_table("variant", rows), ""]
        differences = {name: parts[part] for name, parts in summary["differences"].items()}
        if differences:
            lines += ["Differences, taken seed by seed:", ""]
            lines += [*_spread_table("difference", differences), ""]
        plots.means_with_spread(
            {name: {language: cell["seeds"] for language, cell in row.items()} for name, row in rows.items()},
            chance=content["chance"],
            title=f"{part}: {content['unit']}",
            y_label=content["unit"],
            path=folder / f"{part}.png",
        )
        lines += [f"![{content['unit'].capitalize()}, {part}]({part}.png)", ""]
    machine = {key: content[key] for key in ("device", "python", "versions", "commit")}
    lines += ["Made with: " + ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _spread_table(what: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    languages = list(next(iter(rows.values())))
    body = []
    for name, row in rows.items():
        cells = [
            f"{c['mean']:.1f}" + (f" {_PLUS_MINUS} {c['std']:.1f}" if c["std"] is not None else "")
            for c in row.values()
        ]
        body.append([name, *cells])
    return table([what, *languages], body)
