"""What the experts and the language mix do: variants of one small model, trained from the same seeds.

Per seed, all variants share the text-pretrained decoder, and variants of one mix share the aligned projector, bit for
bit; with and without experts differ in the instruction stage only. All take the same number of steps per stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parrot_sys.data.constants import LANGUAGES
from parrot_sys.evaluation import plots, recipes
from parrot_sys.evaluation.markdown import table
from parrot_sys.evaluation.pipeline import Pipeline, Step
from parrot_sys.evaluation.report import headline, load_scores
from parrot_sys.training.writer import read_metrics

AVERAGE = "mean"
"""Key of the mean over languages, beside the languages."""
_PLUS_MINUS = "\u00b1"
_OTHERS = tuple(language for language in LANGUAGES if language != "en")
MIXES: Mapping[str, Mapping[str, float]] = {
    "balanced": {},
    "imbalanced": dict.fromkeys(_OTHERS, 0.1),
    "english": dict.fromkeys(_OTHERS, 0.0),
}
"""Mix -> how often an epoch of stages 1 and 2 takes each conversation of a language; 1 where not named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to train."""

    name: str
    mix: str
    experts: bool
    description: str


VARIANTS = (
    Variant(name="experts, balanced", mix="balanced", experts=True, description="as in the demo"),
    Variant(name="plain, balanced", mix="balanced", experts=False, description="routing off: projector only"),
    Variant(
        name="experts, imbalanced", mix="imbalanced", experts=True, description="stages 1 and 2 with 10 % of the others"
    ),
    Variant(name="plain, imbalanced", mix="imbalanced", experts=False, description="the same, projector only"),
    Variant(name="experts, English only", mix="english", experts=True, description="stages 1 and 2 in English only"),
)
COMPARISONS = (
    ("experts - plain, balanced", "experts, balanced", "plain, balanced"),
    ("experts - plain, imbalanced", "experts, imbalanced", "plain, imbalanced"),
    ("balanced - imbalanced, experts", "experts, balanced", "experts, imbalanced"),
    ("balanced - English only, experts", "experts, balanced", "experts, English only"),
)
"""(name, variant, variant it is compared with); differences are taken seed by seed."""

Accuracy = dict[str, dict[str, float]]
"""part -> language (and AVERAGE) -> percent."""


def run_variant(pipeline: Pipeline, data: Step, variant: Variant, seed: int, flags: Sequence[str]) -> Step:
    """Trains and evaluates; steps that variants share are done once.

    Returns:
        The evaluation step.
    """
    seeded = ["--seed", str(seed), "--data.seed", str(seed), "--checkpoint.keep-last", "1", *flags]
    root = f"seed{seed}"
    pretrain = recipes.train(pipeline, recipes.PRETRAIN, data, name=f"{root}/pretrain", flags=seeded)
    align = _stage(pipeline, recipes.ALIGN, data, pretrain, variant.mix, f"{root}/align", seeded)
    if not variant.experts:
        align = recipes.without_experts(pipeline, align, name=f"{root}/align-{variant.mix}-plain")
        seeded += ["--model.moe.num-experts", "0"]
    kind = "experts" if variant.experts else "plain"
    model = _stage(pipeline, recipes.INSTRUCT, data, align, variant.mix, f"{root}/instruct-{kind}", seeded)
    name = f"{root}/evaluation-{kind}-{variant.mix}"
    return recipes.evaluate(pipeline, model, data, name=name, flags=["--max-new-tokens", "16"])


def _stage(
    pipeline: Pipeline, stage: recipes.Stage, data: Step, start: Step, mix: str, name: str, flags: Sequence[str]
) -> Step:
    """One stage on one mix, with as many steps as the balanced mix takes."""
    if mix == "balanced":
        return recipes.train(pipeline, stage, data, start, name=f"{name}-{mix}", flags=flags)
    steps = read_metrics(pipeline.root / f"{name}-balanced", "train")[-1]["step"]
    weights = [text for language, weight in MIXES[mix].items() for text in (language, str(weight))]
    more = ["--data.language-weights", *weights, "--max-steps", str(steps)]
    return recipes.train(pipeline, stage, data, start, name=f"{name}-{mix}", flags=[*flags, *more])


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


def summarize(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean and spread over seeds of every variant, and of the differences between variants.

    Args:
        results: variant -> seed -> record with `accuracy`.

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
            for name, a, b in COMPARISONS
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_report(content: Mapping[str, Any], folder: Path) -> Path:
    """report.md with one plot per part, from what the JSON holds; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = max((len(runs) for runs in content["results"].values()), default=0)
    lines = [
        "# What the experts and the language mix do",
        "",
        __doc__.split("\n\n", 1)[1].replace("\n", " ").strip(),
        "The variants without experts have fewer parameters. One data set serves all seeds; a seed decides initial "
        "weights and the order of the data.",
        "",
        f"Accuracy in percent, mean {_PLUS_MINUS} sample standard deviation over at most {seeds} seeds; guessing gives "
        f"{content['chance']:.0f}.",
        "",
        *[f"* **{name}**: {description}" for name, description in content["variants"].items()],
        "",
    ]
    summary = content["summary"]
    for part in next(iter(summary["variants"].values()), {}):
        rows = {name: parts[part] for name, parts in summary["variants"].items()}
        counts = next(iter(next(iter(content["results"].values())).values()))["n"][part]
        lines += [f"## {part} (n = {min(counts.values())} to {max(counts.values())} rows a language and seed)", ""]
        lines += [*_spread_table("variant", rows), ""]
        differences = {name: parts[part] for name, parts in summary["differences"].items()}
        if differences:
            lines += ["Differences in percentage points, taken seed by seed:", ""]
            lines += [*_spread_table("difference", differences), ""]
        plots.means_with_spread(
            {name: {language: cell["seeds"] for language, cell in row.items()} for name, row in rows.items()},
            chance=content["chance"],
            title=f"{part}: accuracy per language",
            path=folder / f"{part}.png",
        )
        lines += [f"![Accuracy per language, {part}]({part}.png)", ""]
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
