"""Report of an evaluation: `report.json`, `report.md` and PNG plots from the score files of the runner.

`report.json` is `{part: {language: accuracy in percent, ...}, ..., "details": {...}}`. The accuracy at these keys is
the one that the public kit headlines: circular for sets whose name contains `mmbench` (or ccbench, circular, mmcr),
plain otherwise, and where nothing is rotated; both are in `details.cells`. `details.measure` says what the answers are
and whether the kit reports such figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from parrot_sys.data.languages import in_order
from parrot_sys.errors import DataError
from parrot_sys.evaluation.headlines import (
    ROUTINGS,
    Scores,
    average_interval,
    beside_scores,
    headlines,
    held,
    measure_of,
    metric_of,
    outcomes_of,
)
from parrot_sys.evaluation.language_groups import group_languages
from parrot_sys.evaluation.markdown import render
from parrot_sys.evaluation.outcomes import METRICS, compare_languages
from parrot_sys.evaluation.report_plots import draw
from parrot_sys.evaluation.results import check_alike, read_score_files
from parrot_sys.evaluation.routes import measure_routes
from parrot_sys.evaluation.runner import SCORES_SUFFIX
from parrot_sys.training.writer import read_metrics

_LENIENT = (
    "Options are extracted by lenient rules, which no public kit uses; accuracies by the kit's `current` rules are "
    "shown next to those by the lenient ones."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInput:
    """Input of a report."""

    evaluation: Path
    """Output folder of `parrot eval`."""
    output: Path
    """Folder for report.md, report.json and the plots."""
    runs: Mapping[str, Path] = field(default_factory=dict)
    """Stage -> folder of its training run, for the loss curves."""
    title: str = "Evaluation report"
    notes: Sequence[str] = ()
    """Sentences that a reader must know, such as that questions were sub-sampled."""
    appendix: Sequence[str] = ()
    """Lines of Markdown after the tables."""


def build_report(report: ReportInput) -> dict[str, Any]:
    """Writes report.json, report.md and the plots.

    Returns:
        The content of report.json.

    Raises:
        DataError: the evaluation folder holds no scores of the model's own routing.
        ConfigError: it holds scores of different models or settings.
    """
    scores = load_scores(report.evaluation)
    if not any("model" in routings for routings in scores.values()):
        raise DataError(
            f"{report.evaluation} holds no {SCORES_SUFFIX} file below a folder `model`; run parrot eval first"
        )
    curves = {stage: load_curves(run) for stage, run in report.runs.items()}
    report.output.mkdir(parents=True, exist_ok=True)
    routes = {suite: measure_routes(routings.get("model", {})) for suite, routings in scores.items()}
    images = draw(scores, curves, routes, report.output)
    content: dict[str, Any] = {suite: headlines(routings.get("model", {})) for suite, routings in scores.items()}
    content["details"] = {
        **_details(scores, report),
        "routes": {suite: found for suite, found in routes.items() if found},
    }
    plain = _finite(content)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    (report.output / "report.json").write_text(text, encoding="utf-8")
    (report.output / "report.md").write_text(render(report.title, plain, images, report.appendix), encoding="utf-8")
    return content


def load_scores(folder: Path) -> Scores:
    """Score files below `folder`, part by part (see `QuestionSet.parts`), languages in the order of reports.

    Raises:
        ConfigError: they are of different models or settings.
    """
    files = read_score_files(folder)
    check_alike(files)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in files:
        result = {key: value for key, value in file.content.items() if key != "parts"}
        for part, scores in file.content["parts"].items():
            probes = result.get("logit_changes", {}).get(part, {})
            changes = {"logit_change": {routing: probe["change"] for routing, probe in probes.items()}}
            changes |= {"logit_probes": {routing: probe["n"] for routing, probe in probes.items()}}
            languages = found.setdefault(part, {}).setdefault(result["routing"], {})
            languages[result["language"]] = {**result, **scores, **changes}
    return {
        suite: {
            routing: {language: routings[routing][language] for language in in_order(routings[routing])}
            for routing in ROUTINGS
            if routing in routings
        }
        for suite, routings in found.items()
    }


def load_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) points of a training run: `training`, and `validation` where the run has any."""
    kinds = {"training": "train", "validation": "validation"}
    curves = {name: [(r["step"], r["loss"]) for r in read_metrics(run, kind)] for name, kind in kinds.items()}
    return {name: points for name, points in curves.items() if points}


def _training(run: Path) -> dict[str, Any] | None:
    """First and last losses with the number of labels that each is the mean over; None for a run without steps."""
    steps, validations = read_metrics(run, "train"), read_metrics(run, "validation")
    if not steps:
        return None
    found = {"first": steps[0], "last": steps[-1], **({"validation": validations[-1]} if validations else {})}
    return {
        "steps": steps[-1]["step"],
        **{f"{name}_loss": record["loss"] for name, record in found.items()},
        **{f"{name}_labels": record["labels"] for name, record in found.items() if "labels" in record},
    }


def _details(scores: Scores, report: ReportInput) -> dict[str, Any]:
    any_result = next(r for routings in scores.values() for languages in routings.values() for r in languages.values())
    own = {suite: routings.get("model", {}) for suite, routings in scores.items()}
    metrics = {suite: metric_of(routings) for suite, routings in scores.items()}
    training = {stage: _training(run) for stage, run in report.runs.items()}
    return {
        "headline": metrics,
        "measure": asdict(measure_of(scores)),
        "rules": any_result["rules"],
        "settings": {k: v for k, v in any_result["settings"].items() if k not in ("routing", "table")},
        "notes": [*report.notes, *_notes(scores)],
        "average": {suite: fmean(headlines(languages).values()) for suite, languages in own.items() if languages},
        "languages": group_languages(scores),
        "intervals": {suite: _intervals(routings) for suite, routings in scores.items()},
        "cells": {suite: {language: _cell(r) for language, r in languages.items()} for suite, languages in own.items()},
        "routing": _ablations(scores),
        "paired": _paired(scores, metrics),
        **{
            key: {suite: held(languages, key) for suite, languages in own.items()}
            for key in ("logit_change", "logit_probes", "experts")
        },
        "training": {stage: found for stage, found in training.items() if found},
    }


def _cell(result: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a language, without the columns of single rows."""
    beside = {"beside": _without_rows(result["scores"]["beside"])} if "beside" in result["scores"] else {}
    return {
        "dataset": result["dataset"],
        **result["scores"],
        **beside,
        "intervals": result.get("intervals", {}),
        "normalised": _without_rows(result.get("normalised")),
    }


def _without_rows(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The result of `outcomes.score_other` without its column."""
    return None if scores is None else {key: value for key, value in scores.items() if key != "right"}


def _intervals(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Routing, `normalised` or `beside` -> metric -> language and `mean` -> 95% interval, where there is one."""
    own = routings.get("model", {})
    sources: list[tuple[str, Mapping[str, Mapping[str, Any]], str | None]] = [
        *((routing, languages, None) for routing, languages in routings.items()),
        *((other, own, other) for other in ("normalised", "beside")),
    ]
    found: dict[str, Any] = {}
    for source, languages, other in sources:
        for metric in METRICS:
            held = {
                language: beside_scores(result, other).get("intervals", {}).get(metric)
                for language, result in languages.items()
            }
            held["mean"] = average_interval(languages, metric, other)
            if held := {key: interval for key, interval in held.items() if interval is not None}:
                found.setdefault(source, {})[metric] = held
    return found


def _ablations(scores: Scores) -> dict[str, Any]:
    return {
        routing: {
            suite: {
                language: {key: r["scores"][key] for key in (*METRICS, "n", "n_questions")}
                for language, r in routings[routing].items()
            }
            for suite, routings in scores.items()
            if routing in routings
        }
        for routing in ROUTINGS[1:]
        if any(routing in routings for routings in scores.values())
    }


def _paired(scores: Scores, metrics: Mapping[str, str]) -> dict[str, Any]:
    """Routing -> part -> language (and `all`) -> the model's own routes against these, by what the part is known by."""
    found: dict[str, Any] = {}
    for suite, routings in scores.items():
        own = outcomes_of(routings.get("model", {}), metrics[suite])
        for routing in ROUTINGS[1:]:
            other = outcomes_of(routings.get(routing, {}), metrics[suite])
            if tests := compare_languages(own, other):
                found.setdefault(routing, {})[suite] = tests
    return found


def _notes(scores: Scores) -> list[str]:
    """Notes of the runs over the tables, each sentence once."""
    results = [r for routings in scores.values() for languages in routings.values() for r in languages.values()]
    lenient = [_LENIENT] if any(result["rules"] == "lenient" for result in results) else []
    return [*lenient, *dict.fromkeys(note for result in results for note in result.get("notes", ()))]


def _finite(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
