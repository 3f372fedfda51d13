"""Summary at the end of `parrot eval`: accuracies as a table for the terminal, and the files for the public kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parrot_sys.evaluation.headlines import measure_of, metric_of
from parrot_sys.evaluation.language_groups import group_languages, group_table
from parrot_sys.evaluation.markdown import INTERVAL, is_rotated
from parrot_sys.evaluation.outcomes import METRICS
from parrot_sys.evaluation.report import load_scores
from parrot_sys.markdown_tables import interval_text, language_table, percent


def offers(results: Sequence[Mapping[str, Any]], output: Path) -> list[str]:
    """Lines on the files for the public kit: which there are, and which tables it would refuse and why.

    Args:
        results: from `evaluate`.
        output: folder that they lie in.
    """
    lines: dict[str, None] = {}
    for result in results:
        name, kit_file = result["dataset"], result["kit_file"]
        if kit_file is None:
            lines[f"Not for the public kit: {name}, as {'; '.join(result['kit_refusals'])}"] = None
        elif result["parts"]:
            lines[f"Predictions for the public kit: {output}/*/*/*.xlsx"] = None
        else:
            lines[f"Predictions to hand in ({name} has no answers to score): {output / kit_file}"] = None
    namesakes = dict.fromkeys(result["dataset"] for result in results if result["kit_namesake"])
    if namesakes:
        lines[
            f"Of {', '.join(namesakes)} the public kit downloads other tables, and it would score these predictions "
            "against those: give tables and predictions another name first"
        ] = None
    return list(lines)


def summary(output: Path) -> str:
    """Headline accuracies of everything below `output` as a table for the terminal."""
    scores = load_scores(output)
    measure = measure_of(scores)
    lines: list[str] = []
    for suite, routings in scores.items():
        languages = list(next(iter(routings.values())))
        metrics = METRICS if any(is_rotated(_scores(held)) for held in routings.values()) else METRICS[:1]
        rows: list[list[str]] = []
        for key in metrics:
            star = " *" if key == metric_of(routings) else ""
            for routing, held in routings.items():
                rows += _summary_rows(f"{key}{star}, routing {routing}", _scores(held), key, languages)
        own = _scores(routings.get("model", {}))
        beside = {language: each["beside"] for language, each in own.items() if "beside" in each}
        for key in metrics if beside else ():
            rows += _summary_rows(f"{key}, {next(iter(beside.values()))['rules']} rules", beside, key, languages)
        counts = _scores(next(iter(routings.values())))
        rows.append(["n rows", *(str(counts[language]["n"]) for language in languages)])
        lines += ["", *language_table([f"{suite}: accuracy in %", *languages], rows)]
    if groups := group_languages(scores):
        lines += ["", *group_table(groups, measure.short)]
    kit = "the accuracy that the public kit reports for this set" if measure.public_kit else measure.answers
    return "\n".join([*lines, "", f"Intervals are clustered by picture. * {kit}"])


def _scores(languages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Language -> scores with their intervals."""
    return {
        language: {**result["scores"], **({"intervals": result["intervals"]} if "intervals" in result else {})}
        for language, result in languages.items()
    }


def _summary_rows(
    name: str, scores: Mapping[str, Mapping[str, Any]], metric: str, languages: Sequence[str]
) -> list[list[str]]:
    """A row of accuracies, and one of their intervals where there are any."""
    cells = [scores.get(language, {}) for language in languages]
    rows = [[name, *(percent(cell.get(metric)) for cell in cells)]]
    if any("intervals" in cell for cell in cells):
        rows.append([INTERVAL, *(interval_text(cell.get("intervals", {}).get(metric)) for cell in cells)])
    return rows
