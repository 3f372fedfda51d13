"""Text of the report, from the content of `report.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from parrot_sys.evaluation.language_groups import group_table
from parrot_sys.evaluation.outcomes import METRICS
from parrot_sys.evaluation.routes import routes_section
from parrot_sys.markdown_tables import fixed, interval_text, language_table, p_value, percent, table

_PLAIN = "*Plain* accuracy counts rows."
_CIRCULAR = (
    "*Circular* accuracy, where a table has rotations, counts questions: one is right only when every rotation of its "
    "options is."
)
_PER_TOKEN = "Rows *per token* take the option with the highest mean log-likelihood of a token instead."
_KIT = "The one in bold is what the public kit reports for a set of this name."
_OWN = "The one in bold is the headline here."
_BASELINES = (
    "*Guessing* is the expected accuracy of a random option, *majority* that of always answering the most frequent "
    "letter."
)
INTERVAL = "95% interval"
_INTERVALS = (
    "An accuracy has its 95% interval below it or in brackets: Wilson's, with Student's t. Answers that share a "
    "picture (in several languages, rotations or questions) or a question depend on each other and count as one "
    "cluster. The intervals say what other pictures might give, not what another training run might."
)
_TOGETHER = (
    "Languages together: the mean over languages (each counts alike), the language that fares worst, and the means "
    "over the languages of a script."
)
PAIRED = (
    "first minus second in points, over the same rows; in brackets the discordant answers (right only in the first : "
    "right only in the second) and p of McNemar's exact test, in which answers that share a picture change sides "
    "together. No p is corrected for the number of comparisons."
)


def render(
    title: str, content: Mapping[str, Any], images: Sequence[tuple[str, str]], appendix: Sequence[str] = ()
) -> str:
    """Markdown of a report.

    Args:
        title: heading.
        content: what report.json holds.
        images: (caption, file name beside the report).
        appendix: lines after the tables.
    """
    details = content["details"]
    lines = [f"# {title}", ""]
    lines += [f"> {note}\n" for note in details["notes"]]
    generated = details["settings"].get("mode", "generate") == "generate"
    rules = f" Option extraction: `{details['rules']}` rules." if generated else ""
    lines += [f"{details['measure']['answers']}{rules} Settings: {_settings(details['settings'])}.", ""]
    parts = details["cells"].values()
    per_token = any(cell["normalised"] for cells in parts for cell in cells.values())
    explained = [
        _PLAIN,
        *([_CIRCULAR] if any(map(is_rotated, parts)) else []),
        *([_PER_TOKEN] if per_token else []),
        _KIT if details["measure"]["public_kit"] else _OWN,
    ]
    lines += [" ".join([*explained, _BASELINES]), "", _INTERVALS, ""]
    if len(details["average"]) > 1:
        lines += ["## All parts", "", *_overview(content), ""]
    if details["languages"]:
        lines += [_TOGETHER, "", *group_table(details["languages"], details["measure"]["short"]), ""]
    for suite, cells in details["cells"].items():
        if cells:
            lines += _suite(suite, cells, details)
    lines += routes_section(details["routes"])
    if details["training"]:
        lines += ["## Training", "", _LOSSES, "", *_training(details["training"]), ""]
    lines += [*appendix, "## Plots", ""]
    for caption, file in images:
        lines += [f"![{_bare(caption)}]({file})", f"*{_bare(caption)}*", ""]
    return "\n".join(lines)


def is_rotated(cells: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a question of a part has several rows, with its options rotated. `cells`: language -> scores."""
    return any(cell["n_questions"] < cell["n"] for cell in cells.values())


def paired_table(what: str, comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]], *, scale: float) -> list[str]:
    """Table of paired tests.

    Args:
        what: above the names of the comparisons.
        comparisons: name -> language (or all) -> values of a `Paired`.
        scale: of the differences: 100 for accuracies, which are shown in points.
    """
    columns = list(dict.fromkeys(column for tests in comparisons.values() for column in tests))
    rows = []
    for name, tests in comparisons.items():
        sizes = [str(test["n"]) for test in tests.values()]
        cells = [_paired(tests[column], scale) if column in tests else "-" for column in columns]
        rows.append([name, " / ".join(dict.fromkeys(sizes)), *cells])
    return language_table([what, "n pairs (a language / all)", *columns], rows)


def _paired(test: Mapping[str, Any], scale: float) -> str:
    difference = fixed(scale * test["difference"], 1, sign=True)
    return f"{difference} ({test['first_only']} : {test['second_only']}, p {_probability(test['p'])})"


def _probability(p: float) -> str:
    return p_value(p) if p < 0.001 else f"= {p_value(p)}"


def _overview(content: Mapping[str, Any]) -> list[str]:
    """One line a part: the accuracy that its set is known by, per language."""
    details = content["details"]
    languages = list(dict.fromkeys(language for part in details["average"] for language in content[part]))
    rows = []
    for part, average in details["average"].items():
        metric, cells = details["headline"][part], details["cells"][part]
        ends = details["intervals"][part].get("model", {}).get(metric, {})
        accuracies = [percent(content[part].get(language), ends.get(language)) for language in languages]
        guessing = fmean(cell["baselines"]["random"][metric] for cell in cells.values())
        mean = percent(average, ends.get("mean"))
        n = str(sum(cell["n_questions" if metric == "circular" else "n"] for cell in cells.values()))
        rows.append([part, metric, n, *accuracies, f"**{mean}**", percent(guessing)])
    header = [f"accuracy (%), {details['measure']['short']}", "counted", "n, all languages"]
    return language_table([*header, *languages, "mean", "guessing"], rows)


def _suite(suite: str, cells: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> list[str]:
    metric = details["headline"][suite]
    lines = [f"## {' '.join(suite.split())}", "", *_accuracies(suite, cells, details), "", *_counts(cells), ""]
    if tests := {
        f"own routes - routing {routing}": suites[suite]
        for routing, suites in details["paired"].items()
        if suite in suites
    }:
        lines += [f"What the routes do, {metric} accuracy: {PAIRED}", ""]
        lines += [*paired_table("routes", tests, scale=100), ""]
    if change := details["logit_change"].get(suite):
        lines += [
            "Largest change of a next-token logit when the route is replaced, over some questions of this part with "
            "pictures (0 would mean bypassed experts):",
            "",
            *_logit_changes(change, details["logit_probes"][suite]),
            "",
        ]
    for key, what in (("by_l2_category", "l2-category"), ("by_category", "category")):
        lines += _by(key, what, cells, metric)
    return lines


def _logit_changes(changes: Mapping[str, Mapping[str, float]], probes: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = []
    for routing in dict.fromkeys(routing for change in changes.values() for routing in change):
        cells = [
            f"{changes[language][routing]:.3g} (n = {probes[language][routing]})"
            if routing in changes[language]
            else "-"
            for language in changes
        ]
        rows.append([routing, *cells])
    return language_table(["routing (n questions)", *changes], rows)


def _accuracies(suite: str, cells: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> list[str]:
    languages, metrics = list(cells), METRICS if is_rotated(cells) else METRICS[:1]
    rows: list[list[str]] = []

    def add(name: str, held: Mapping[str, Mapping[str, Any]], metric: str, source: str = "") -> None:
        values = [held[language][metric] if language in held else None for language in languages]
        numbers = [value for value in values if value is not None]
        rows.append([name, *map(percent, values), percent(sum(numbers) / len(numbers) if numbers else None)])
        if ends := details["intervals"][suite].get(source, {}).get(metric):
            rows.append([INTERVAL, *(interval_text(ends.get(key)) for key in (*languages, "mean"))])

    for metric in metrics:
        add(f"**{metric}**" if metric == details["headline"][suite] else metric, cells, metric, "model")
    tokens = {language: cell["normalised"] for language, cell in cells.items() if cell["normalised"]}
    for metric in metrics if tokens else ():
        add(f"{metric}, per token", tokens, metric, "normalised")
    others = {language: cell["beside"] for language, cell in cells.items() if "beside" in cell}
    for metric in metrics if others else ():
        add(f"{metric}, {next(iter(others.values()))['rules']} rules", others, metric, "beside")
    for routing, suites in details["routing"].items():
        held = suites.get(suite, {})
        # an ablation may be limited to fewer questions than the main run
        n = (
            ""
            if all(held[lang]["n"] == cells[lang]["n"] for lang in held)
            else f" (n = {next(iter(held.values()))['n']})"
        )
        for metric in metrics:
            add(f"routing {routing}, {metric}{n}", held, metric, routing)
    for name, label in (("random", "guessing"), ("majority", "majority")):
        for metric in metrics:
            add(f"{label}, {metric}", {language: cell["baselines"][name] for language, cell in cells.items()}, metric)
    return language_table([f"accuracy (%), {details['measure']['short']}", *languages, "mean"], rows)


def _counts(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = {"n": "n rows", "n_questions": "n questions", "unmatched": "unmatched answers", "refused": "refusals"}
    rows = []
    for key, label in names.items():
        counts = [cell[key] for cell in cells.values()]
        rows.append([label, *map(str, counts), str(sum(counts))])
    if any(bad := [cell.get("bad_questions", 0) for cell in cells.values()]):
        rows.append(["bad questions", *map(str, bad), str(sum(bad))])
    if all("beside" in cell for cell in cells.values()):
        counts = [cell["beside"]["unmatched"] for cell in cells.values()]
        rules = next(iter(cells.values()))["beside"]["rules"]
        rows.append([f"unmatched answers, {rules} rules", *map(str, counts), str(sum(counts))])
    return language_table(["count", *cells, "sum"], rows)


def _by(key: str, what: str, cells: Mapping[str, Mapping[str, Any]], metric: str) -> list[str]:
    names = sorted({name for cell in cells.values() for name in cell[key]})
    if not names:
        return []
    counted = "n_questions" if metric == "circular" else "n"
    rows = []
    for name in names:
        row = []
        for cell in cells.values():
            held, ends = cell[key].get(name), cell["intervals"].get(key, {}).get(name, {}).get(metric)
            row.append(f"{percent(held[metric], ends)} (n = {held[counted]})" if held else "-")
        rows.append([name, *row])
    return [*language_table([f"{what}: {metric} accuracy (%)", *cells], rows), ""]


_LOSSES = (
    "A loss is the mean over labels, the tokens that are learned: first and last of training over those of a logging "
    "interval (all its steps, micro-batches and processes), that of validation over those of the held-out records."
)


def _training(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = ("first", "last", "validation")
    rows = [
        [stage, str(found["steps"]), *(_loss(found.get(f"{name}_loss"), found.get(f"{name}_labels")) for name in names)]
        for stage, found in stages.items()
    ]
    return table(["stage", "steps", *(f"{name} loss" for name in names)], rows)


def _loss(loss: float | None, labels: int | None) -> str:
    return fixed(loss, 3) + (f" (n = {labels} labels)" if labels else "")


def _bare(caption: str) -> str:
    """Text of a caption, in which brackets and stars are no Markdown."""
    return re.sub(r"([\\\[\]*])", r"\\\1", " ".join(caption.split()))


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} `{str(value)[:16]}`" for key, value in settings.items())
