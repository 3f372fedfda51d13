"""Text of the report, from the content of `report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_EXPLANATION = """\
*Plain* accuracy counts rows; *circular* accuracy counts questions, and a question is right only when every rotation of
its options is. Where a table has no rotations both are the same. The one in bold is what the public kit reports for a
set of this name. *Guessing* is the expected accuracy of a random option, *majority* that of always answering the most
frequent letter."""


def render(
    title: str, content: Mapping[str, Any], images: Sequence[tuple[str, str]], appendix: Sequence[str] = ()
) -> str:
    """Markdown of a report.

    Args:
        title: heading.
        content: what report.json holds.
        images: (caption, file name beside the report).
        appendix: lines behind the tables.
    """
    details = content["details"]
    lines = [f"# {title}", ""]
    lines += [f"> {note}\n" for note in details["notes"]]
    lines += [
        f"Option extraction: `{details['rules']}` rules. Settings: {_settings(details['settings'])}.",
        "",
        _EXPLANATION,
        "",
    ]
    if len(details["average"]) > 1:
        lines += ["## All parts", "", *_overview(content), ""]
    for suite, cells in details["cells"].items():
        if cells:
            lines += _suite(suite, cells, details)
    if details["training"]:
        lines += ["## Training", "", *_training(details["training"]), ""]
    lines += [*appendix, "## Plots", ""]
    for caption, file in images:
        lines += [f"![{caption}]({file})", f"*{caption}*", ""]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, first column left, the others right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, marks, *rows)]


def percent(value: float | None) -> str:
    """One decimal, or a dash where there is no number."""
    return "-" if value is None else f"{value:.1f}"


def _overview(content: Mapping[str, Any]) -> list[str]:
    """One line a part: the accuracy that its set is known by, per language."""
    details = content["details"]
    languages = list(dict.fromkeys(language for part in details["average"] for language in content[part]))
    rows = []
    for part, average in details["average"].items():
        accuracies = [percent(content[part].get(language)) for language in languages]
        guessing = fmean(c["baselines"]["random"][details["headline"][part]] for c in details["cells"][part].values())
        rows.append([part, *accuracies, f"**{percent(average)}**", percent(guessing)])
    return table(["accuracy (%)", *languages, "mean", "guessing"], rows)


def _suite(suite: str, cells: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> list[str]:
    metric = details["headline"][suite]
    lines = [f"## {suite}", "", *_accuracies(suite, cells, details), "", *_counts(cells), ""]
    if change := details["logit_change"].get(suite):
        routings = list(next(iter(change.values())))
        rows = [[routing, *[f"{change[language][routing]:.3g}" for language in change]] for routing in routings]
        lines += [
            "Largest change of a next-token logit when the route is replaced (0 would mean bypassed experts):",
            "",
            *table(["routing", *change], rows),
            "",
        ]
    for key, what in (("by_l2_category", "l2-category"), ("by_category", "category")):
        lines += _by(key, what, cells, metric)
    return lines


def _accuracies(suite: str, cells: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> list[str]:
    languages = list(cells)

    def row(name: str, values: Sequence[float | None]) -> list[str]:
        numbers = [value for value in values if value is not None]
        return [name, *map(percent, values), percent(sum(numbers) / len(numbers) if numbers else None)]

    rows = []
    for key in ("plain", "circular"):
        name = f"**{key}**" if key == details["headline"][suite] else key
        rows.append(row(name, [cells[language][key] for language in languages]))
    rows += [row(name, values) for name, values in beside_rows(cells)]
    for routing, suites in details["routing"].items():
        held = suites.get(suite, {})
        # an ablation may be limited to fewer questions than the main run
        n = (
            ""
            if all(held[lang]["n"] == cells[lang]["n"] for lang in held)
            else f" (n = {next(iter(held.values()))['n']})"
        )
        for key in ("plain", "circular"):
            values = [held[language][key] if language in held else None for language in languages]
            rows.append(row(f"routing {routing}, {key}{n}", values))
    for name, label in (("random", "guessing"), ("majority", "majority")):
        for key in ("plain", "circular"):
            rows.append(row(f"{label}, {key}", [cells[language]["baselines"][name][key] for language in languages]))
    return table(["accuracy (%)", *languages, "mean"], rows)


def beside_rows(cells: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """(label, accuracy per language) by the extraction rules that stand next to the chosen ones; none of likelihoods.

    Args:
        cells: language -> scores of a part.
    """
    others = {language: cell["beside"] for language, cell in cells.items() if "beside" in cell}
    if not others:
        return []
    rules = next(iter(others.values()))["rules"]
    return [
        (f"{key}, {rules} rules", [others[language][key] if language in others else None for language in cells])
        for key in ("plain", "circular")
    ]


def _counts(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = {"n": "n rows", "n_questions": "n questions", "unmatched": "unmatched answers", "refused": "refusals"}
    rows = []
    for key, label in names.items():
        counts = [cell[key] for cell in cells.values()]
        rows.append([label, *map(str, counts), str(sum(counts))])
    if all("beside" in cell for cell in cells.values()):
        counts = [cell["beside"]["unmatched"] for cell in cells.values()]
        rules = next(iter(cells.values()))["beside"]["rules"]
        rows.append([f"unmatched answers, {rules} rules", *map(str, counts), str(sum(counts))])
    return table(["count", *cells, "sum"], rows)


def _by(key: str, what: str, cells: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    names = sorted({name for cell in cells.values() for name in cell[key]})
    if not names:
        return []
    rows = []
    for name in names:
        held = {language: cell[key].get(name) for language, cell in cells.items()}
        rows.append([name, *[f"{percent(c[metric])} ({c['n']})" if c else "-" for c in held.values()]])
    return [*table([f"{what}: {metric} (n rows)", *cells], rows), ""]


def _training(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return table(
        ["stage", "steps", "first loss", "last loss", "validation loss"],
        [
            [
                name,
                str(s["steps"]),
                f"{s['first_loss']:.3f}",
                f"{s['last_loss']:.3f}",
                f"{s['validation_loss']:.3f}" if "validation_loss" in s else "-",
            ]
            for name, s in stages.items()
        ],
    )


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} `{str(value)[:16]}`" for key, value in settings.items())
