"""Plots of a report, with their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from parrot_sys import heat_maps
from parrot_sys.evaluation import plots
from parrot_sys.evaluation.headlines import (
    ROUTINGS,
    Scores,
    average_interval,
    headline,
    headlines,
    held,
    measure_of,
    metric_of,
)
from parrot_sys.evaluation.outcomes import Interval
from parrot_sys.fonts import explain_numbers
from parrot_sys.markdown_tables import fixed
from parrot_sys.routes import usage_text


def draw(
    scores: Scores,
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    routes: Mapping[str, Mapping[str, Any]],
    output: Path,
) -> list[tuple[str, str]]:
    """Makes the plots of a report; (caption, file name) of each.

    Args:
        scores: of the evaluation.
        curves: stage -> line -> (step, loss) points.
        routes: part -> what `measure_routes` found.
        output: folder.
    """
    images: list[tuple[str, str]] = []

    def add(caption: str, file: str, legend: Mapping[str, str]) -> None:
        images.append((". ".join(filter(None, (caption, explain_numbers(legend)))), file))

    if curves:
        legend = plots.loss_curves(curves, output / "loss.png")
        add("Loss of each stage: mean over the labels of a logging interval, or of a validation", "loss.png", legend)
    metrics = {suite: metric_of(routings) for suite, routings in scores.items()}
    guessing = {suite: _guessing(_any_languages(routings)) for suite, routings in scores.items()}
    measure = measure_of(scores)
    own = {suite: routings["model"] for suite, routings in scores.items() if "model" in routings}
    if len(own) > 1:
        legend = plots.accuracy_by_part(
            {suite: headlines(languages) for suite, languages in own.items()},
            {suite: average_interval(languages, metrics[suite]) for suite, languages in own.items()},
            guessing,
            title=f"All parts, the model's own routing, {measure.short}",
            path=output / "parts.png",
        )
        caption = "Accuracy of each part: mean over languages with its 95% interval (bar) and each language (dots)"
        add(caption, "parts.png", legend)
    legend = plots.accuracy_by_language(
        {suite: {routing: headlines(languages) for routing, languages in r.items()} for suite, r in scores.items()},
        {
            suite: {routing: _intervals(languages, metrics[suite]) for routing, languages in r.items()}
            for suite, r in scores.items()
        },
        guessing,
        {suite: f"({metric} accuracy, {measure.short})" for suite, metric in metrics.items()},
        output / "accuracy.png",
    )
    add(_accuracy_caption(scores), "accuracy.png", legend)
    for number, (suite, routings) in enumerate(scores.items()):
        languages, file = routings.get("model", {}), _file_part(suite, number)
        for caption, name, legend in _draw_categories(suite, languages, metrics[suite], guessing[suite], output, file):
            add(caption, name, legend)
        if held(languages, "experts"):
            add(*_draw_experts(suite, languages, routes[suite], output, f"experts_{file}.png"))
    return images


def _draw_experts(
    suite: str, languages: Mapping[str, Mapping[str, Any]], routes: Mapping[str, Any], output: Path, file: str
) -> tuple[str, str, Mapping[str, str]]:
    weights = held(languages, "experts")
    usage = usage_text(routes["entropy"], routes["most"], routes["dead"]) if routes else ""
    legend = heat_maps.routing_weights(
        weights,
        name=suite,
        title="mean routing weight" + (f"\n{usage}" if usage else ""),
        path=output / file,
    )
    shown = [
        sum(each is not None for each in languages[language].get("rows", {}).get("picture", ())) for language in weights
    ]
    uniform = 1 / max(map(len, weights.values()))
    n = "" if not all(shown) else f"; n = {_range(shown)} answers about pictures in a language"
    caption = (
        f"Mean routing weight of each expert per language ({suite}); white is an equal share ({fixed(uniform, 3)}), "
        f"red more, blue less"
    )
    return f"{caption}{f'; {usage}' if usage else ''}{n}", file, legend


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _file_part(suite: str, number: int) -> str:
    """The name of a part as a part of a file name."""
    plain = re.sub(r"[^\w.-]+", "_", suite)
    return suite if plain == suite else f"{number}_{plain}"


def _intervals(languages: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, Interval | None]:
    return {language: r.get("intervals", {}).get(metric) for language, r in languages.items()}


def _accuracy_caption(scores: Scores) -> str:
    others = [name for name in ROUTINGS[1:] if any(name in routings for routings in scores.values())]
    ablations = f" and with routing {' and '.join(others)}" if others else ""
    return f"Accuracy per language, with the model's own routing{ablations}"


def _draw_categories(
    suite: str, languages: Mapping[str, Mapping[str, Any]], metric: str, guessing: float, output: Path, file: str
) -> list[tuple[str, str, Mapping[str, str]]]:
    images, counted = [], "n_questions" if metric == "circular" else "n"
    for key, what in (("by_category", "category"), ("by_l2_category", "l2-category")):
        names = sorted({name for result in languages.values() for name in result["scores"][key]})
        if not names:
            continue
        cells = {
            name: {language: r["scores"][key][name] for language, r in languages.items() if name in r["scores"][key]}
            for name in names
        }
        path = output / f"{key.removeprefix('by_')}_{file}.png"
        legend = heat_maps.heat_map(
            {name: {language: cell[metric] for language, cell in row.items()} for name, row in cells.items()},
            name=suite,
            title=f"{metric} accuracy per {what}",
            x_label="language",
            color_label="accuracy (%)",
            limits=(0.0, 100.0),
            mark=("guessing", guessing),
            digits=0,
            path=path,
            counts={name: {language: cell[counted] for language, cell in row.items()} for name, row in cells.items()},
        )
        caption = f"Accuracy per {what} and language ({suite}, {metric}); guessing would give {fixed(guessing, 1)}%"
        images.append((caption, path.name, legend))
    return images


def _any_languages(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Mapping[str, Mapping[str, Any]]:
    return next(iter(routings.values()))


def _guessing(languages: Mapping[str, Mapping[str, Any]]) -> float:
    return fmean(r["scores"]["baselines"]["random"][headline(r["dataset"])] for r in languages.values())


def _first(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Mapping[str, Any]:
    return next(iter(_any_languages(routings).values()))
