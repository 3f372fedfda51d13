"""Report of an evaluation: `report.json`, `report.md` and PNG plots from the score files of the runner.

`report.json` is `{part: {language: accuracy in percent, ...}, ..., "details": {...}}`. The accuracy at these keys is
the one that the public kit headlines: circular for sets whose name contains `mmbench` (or ccbench, circular, mmcr),
plain otherwise; both are in `details.cells`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from parrot_sys.data.constants import LANGUAGES
from parrot_sys.errors import DataError
from parrot_sys.evaluation import plots
from parrot_sys.evaluation.kit import is_circular
from parrot_sys.evaluation.markdown import render
from parrot_sys.evaluation.results import check_alike, read_score_files
from parrot_sys.evaluation.runner import SCORES_SUFFIX
from parrot_sys.training.writer import read_metrics

_LENIENT = (
    "Options are extracted by lenient rules, which no public kit uses; accuracies by the kit's `current` rules stand "
    "next to those by the lenient ones."
)
_ROUTINGS = ("model", "off", "other-language")

Scores = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""part -> routing -> language -> what `runner.evaluate_table` returned, with the `scores` and `experts` of the part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInput:
    """What goes into a report."""

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
    """Lines of Markdown behind the tables."""


def headline(dataset: str) -> str:
    """`circular` or `plain`: the accuracy that the public kit reports for a data set of this name."""
    return "circular" if is_circular(dataset) else "plain"


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
    images = _draw(scores, curves, report.output)
    content: dict[str, Any] = {suite: _headlines(routings.get("model", {})) for suite, routings in scores.items()}
    content["details"] = _details(scores, curves, report.notes)
    plain = _finite(content)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    (report.output / "report.json").write_text(text, encoding="utf-8")
    (report.output / "report.md").write_text(render(report.title, plain, images, report.appendix), encoding="utf-8")
    return content


def load_scores(folder: Path) -> Scores:
    """Score files below `folder`, part by part (see `QuestionSet.parts`), languages in the order of MMMB.

    Raises:
        ConfigError: they are of different models or settings.
    """
    files = read_score_files(folder)
    check_alike(files)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in files:
        result = {key: value for key, value in file.content.items() if key != "parts"}
        for part, scores in file.content["parts"].items():
            found.setdefault(part, {}).setdefault(result["routing"], {})[result["language"]] = {**result, **scores}
    return {
        suite: {
            routing: {language: routings[routing][language] for language in LANGUAGES if language in routings[routing]}
            for routing in _ROUTINGS
            if routing in routings
        }
        for suite, routings in found.items()
    }


def load_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) points of a training run: `training`, and `validation` where the run has any."""
    kinds = {"training": "train", "validation": "validation"}
    curves = {name: [(r["step"], r["loss"]) for r in read_metrics(run, kind)] for name, kind in kinds.items()}
    return {name: points for name, points in curves.items() if points}


def _headlines(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {language: result["scores"][headline(result["dataset"])] for language, result in languages.items()}


def _details(
    scores: Scores, curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], notes: Sequence[str]
) -> dict[str, Any]:
    any_result = next(r for routings in scores.values() for languages in routings.values() for r in languages.values())
    return {
        "headline": {suite: headline(_first(routings)["dataset"]) for suite, routings in scores.items()},
        "rules": any_result["rules"],
        "settings": {k: v for k, v in any_result["settings"].items() if k not in ("routing", "table")},
        "notes": [*notes, *_notes(scores)],
        "average": {
            suite: fmean(_headlines(routings["model"]).values())
            for suite, routings in scores.items()
            if "model" in routings
        },
        "cells": {
            suite: {
                language: {"dataset": r["dataset"], **r["scores"]} for language, r in routings.get("model", {}).items()
            }
            for suite, routings in scores.items()
        },
        "routing": {
            routing: {
                suite: {
                    language: {key: r["scores"][key] for key in ("plain", "circular", "n", "n_questions")}
                    for language, r in routings[routing].items()
                }
                for suite, routings in scores.items()
                if routing in routings
            }
            for routing in _ROUTINGS[1:]
            if any(routing in routings for routings in scores.values())
        },
        "logit_change": {
            suite: {
                language: r["logit_change"]
                for language, r in routings.get("model", {}).items()
                if r.get("logit_change")
            }
            for suite, routings in scores.items()
        },
        "experts": {
            suite: {language: r["experts"] for language, r in routings.get("model", {}).items() if r["experts"]}
            for suite, routings in scores.items()
        },
        "training": {
            stage: {
                "steps": lines["training"][-1][0],
                "first_loss": lines["training"][0][1],
                "last_loss": lines["training"][-1][1],
                **({"validation_loss": lines["validation"][-1][1]} if "validation" in lines else {}),
            }
            for stage, lines in curves.items()
            if "training" in lines
        },
    }


def _draw(
    scores: Scores, curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], output: Path
) -> list[tuple[str, str]]:
    """Makes the plots; (caption, file name) of each."""
    images: list[tuple[str, str]] = []
    if curves:
        plots.loss_curves(curves, output / "loss.png")
        images.append(("Loss of each stage", "loss.png"))
    guessing = {suite: _guessing(_any_languages(routings)) for suite, routings in scores.items()}
    own = {suite: _headlines(routings["model"]) for suite, routings in scores.items() if "model" in routings}
    if len(own) > 1:
        plots.accuracy_by_part(own, guessing, title="All parts, the model's own routing", path=output / "parts.png")
        images.append(("Accuracy of each part: mean over languages (bar) and each language (dots)", "parts.png"))
    plots.accuracy_by_language(
        {suite: {routing: _headlines(languages) for routing, languages in r.items()} for suite, r in scores.items()},
        guessing,
        {suite: f"{suite} ({headline(_first(routings)['dataset'])} accuracy)" for suite, routings in scores.items()},
        output / "accuracy.png",
    )
    images.append((_accuracy_caption(scores), "accuracy.png"))
    for suite, routings in scores.items():
        languages = routings.get("model", {})
        images += _draw_categories(suite, languages, output)
        weights = {language: r["experts"] for language, r in languages.items() if r["experts"]}
        if weights:
            top = max(max(row) for row in weights.values())
            plots.heat_map(
                {language: {f"{e + 1}": weight for e, weight in enumerate(row)} for language, row in weights.items()},
                title=f"{suite}: mean routing weight",
                x_label="expert",
                color_label="weight",
                limits=(0.0, top),
                text_format=".2f",
                path=output / f"experts_{suite}.png",
            )
            images.append((f"Mean routing weight of each expert per language ({suite})", f"experts_{suite}.png"))
    return images


def _accuracy_caption(scores: Scores) -> str:
    others = [name for name in _ROUTINGS[1:] if any(name in routings for routings in scores.values())]
    ablations = f" and with routing {' and '.join(others)}" if others else ""
    return f"Accuracy per language, with the model's own routing{ablations}"


def _notes(scores: Scores) -> list[str]:
    """What the runs over the tables had to say, each sentence once."""
    results = [r for routings in scores.values() for languages in routings.values() for r in languages.values()]
    lenient = [_LENIENT] if any(result["rules"] == "lenient" for result in results) else []
    return [*lenient, *dict.fromkeys(note for result in results for note in result.get("notes", ()))]


def _draw_categories(suite: str, languages: Mapping[str, Mapping[str, Any]], output: Path) -> list[tuple[str, str]]:
    images = []
    for key, what in (("by_category", "category"), ("by_l2_category", "l2-category")):
        names = sorted({name for result in languages.values() for name in result["scores"][key]})
        if not names:
            continue
        cells = {
            name: {language: r["scores"][key][name] for language, r in languages.items() if name in r["scores"][key]}
            for name in names
        }
        metric = {language: headline(result["dataset"]) for language, result in languages.items()}
        file = f"{key.removeprefix('by_')}_{suite}.png"
        plots.heat_map(
            {name: {language: cell[metric[language]] for language, cell in row.items()} for name, row in cells.items()},
            title=f"{suite}: accuracy per {what}",
            x_label="language",
            color_label="accuracy (%)",
            limits=(0.0, 100.0),
            text_format=".0f",
            path=output / file,
            counts={name: {language: cell["n"] for language, cell in row.items()} for name, row in cells.items()},
        )
        images.append((f"Accuracy per {what} and language ({suite})", file))
    return images


def _any_languages(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Mapping[str, Mapping[str, Any]]:
    return next(iter(routings.values()))


def _guessing(languages: Mapping[str, Mapping[str, Any]]) -> float:
    return fmean(r["scores"]["baselines"]["random"][headline(r["dataset"])] for r in languages.values())


def _first(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Mapping[str, Any]:
    return next(iter(_any_languages(routings).values()))


def _finite(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
