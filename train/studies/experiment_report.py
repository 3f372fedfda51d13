"""report.md of an experiment with its plots, from what its JSON holds; also of one that is not finished."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parrot_sys.evaluation import plots
from parrot_sys.evaluation.markdown import PAIRED, paired_table
from parrot_sys.fonts import explain_numbers
from parrot_sys.markdown_tables import fixed, interval_text, table
from studies.experiment import Experiment
from studies.measures import AVERAGE, EXCEPT_EN
from studies.route_tables import routes_table

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
_BOTH = (
    "Differences with 95% intervals over the same questions, by pictures and by seeds (variances of both, Student's t "
    "with Satterthwaite's degrees of freedom): what other pictures and other seeds might give. With one seed, pictures "
    "alone."
)


def write_report(experiment: Experiment, content: Mapping[str, Any], folder: Path) -> Path:
    """report.md with one plot per part and that of the whole; returns its path.

    Args:
        experiment: whose plot is drawn.
        content: the kept result so far.
        folder: for the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = content["summary"]
    seeds = max((len(runs) for runs in content["results"].values()), default=0)
    lines = [
        f"# {content['title']}",
        "",
        f"{content['about']} One data set serves all seeds; a seed decides initial weights and the order of the data.",
        "",
        f"{content['unit'].capitalize()}, mean {_PLUS_MINUS} sample standard deviation over at most {seeds} seeds"
        + ("." if content["chance"] is None else f"; guessing gives {fixed(content['chance'], 0)}.")
        + (f" {_INTERVALS}" if "intervals" in summary else ""),
        "",
        *_variants(content),
        "",
    ]
    if experiment.plot is not None:
        for name, caption in experiment.plot(content, folder).items():
            lines += [f"![{caption}]({name})", ""]
    parts = list(next(iter(summary["variants"].values()), {}))
    if len(parts) > 1:
        plots.means_with_spread(
            {name: {part: row[part][AVERAGE]["seeds"] for part in parts} for name, row in summary["variants"].items()},
            chance=content["chance"],
            title=f"{content['unit'].capitalize()}, mean over languages",
            y_label=textwrap.fill(content["unit"], 40),
            path=folder / "parts.png",
        )
        lines += ["![Mean over languages of each part](parts.png)", ""]
    for part in parts:
        lines += _part(content, part, folder)
    machine = {key: content[key] for key in ("device", "python", "versions", "commit")}
    lines += ["Made with: " + ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    made_at = {commit for runs in content["results"].values() for run in runs.values() for commit in run["commits"]}
    lines += [f"Cells were made at {', '.join(sorted(made_at))}, in {content['minutes']} minutes of work in all."]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _variants(content: Mapping[str, Any]) -> list[str]:
    """Lines that describe each variant and name the seeds that are there."""
    lines = []
    for name, description in content["variants"].items():
        seeds = content["results"].get(name, {})
        lines.append(f"* **{name}**: {description} (" + (f"seeds {', '.join(seeds)})" if seeds else "not run)"))
    return lines


def _part(content: Mapping[str, Any], part: str, folder: Path) -> list[str]:
    summary, scale = content["summary"], content.get("scale", 100.0)
    rows = {name: parts[part] for name, parts in summary["variants"].items()}
    intervals = {name: parts.get(part, {}) for name, parts in summary.get("intervals", {}).items()}
    counts = [n for seeds in content["results"].values() for run in seeds.values() for n in run["n"][part].values()]
    lines = [f"## {part} (n = {min(counts)} to {max(counts)} rows a language and seed)", ""]
    lines += [*_spread_table("variant", rows, intervals), ""]
    if lines_of_routes := routes_table(content["results"], part):
        lines += [*lines_of_routes, ""]
    if differences := {name: parts[part] for name, parts in summary["differences"].items()}:
        lines += ["Differences, taken seed by seed:", "", *_spread_table("difference", differences), ""]
    if paired := {name: held[part] for name, held in summary.get("paired_intervals", {}).items() if part in held}:
        lines += [_BOTH, "", *paired_intervals_table(paired), ""]
    if tests := {name: found[part] for name, found in summary.get("tests", {}).items() if part in found}:
        lines += [f"Question by question, all seeds: {PAIRED if scale == 100 else _PAIRED_COUNTS}", ""]
        lines += [*paired_table("comparison", tests, scale=scale), ""]
    shared = _shared(rows)
    legend = plots.means_with_spread(
        {name: {language: row[language]["seeds"] for language in shared} for name, row in rows.items()},
        chance=content["chance"],
        title=f"{part}: {content['unit']}",
        y_label=textwrap.fill(content["unit"], 40),
        path=folder / f"{_file_name(part)}.png",
    )
    lines += [f"![{content['unit'].capitalize()}, {part}]({_file_name(part)}.png)", ""]
    return [*lines, *([explain_numbers(legend), ""] if legend else [])]


def paired_intervals_table(comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Rows: comparison -> mean over languages (AVERAGE, EXCEPT_EN) -> difference with its interval."""
    keys = [key for key in (AVERAGE, EXCEPT_EN) if any(key in each for each in comparisons.values())]
    rows = []
    for name, means in comparisons.items():
        cells = [
            f"{fixed(means[key]['difference'], 1, sign=True)} {interval_text(means[key]['interval'])}"
            if key in means
            else "-"
            for key in keys
        ]
        first = next(iter(means.values()))
        rows.append([name, str(first["n"]), str(first["pictures"]), str(first["seeds"]), *cells])
    return table(["difference", "n pairs", "pictures", "seeds", *keys], rows)


def _file_name(part: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in part)


def _shared(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Languages and means that all rows have."""
    return [key for key in next(iter(rows.values())) if all(key in row for row in rows.values())]


def _spread_table(
    what: str,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]] | None = None,
) -> list[str]:
    languages = _shared(rows)
    body = []
    for name, row in rows.items():
        ends = {} if intervals is None else intervals.get(name, {})
        seeds = str(max(len(cell["seeds"]) for cell in row.values()))
        body.append([name, seeds, *(_spread_cell(row[language], ends.get(language)) for language in languages)])
    return table([what, "seeds", *languages], body)


def _spread_cell(cell: Mapping[str, Any], interval: Sequence[float] | None) -> str:
    spread = "" if cell["std"] is None else f" {_PLUS_MINUS} {fixed(cell['std'], 1)}"
    ends = "" if interval is None else f" [{fixed(interval[0], 1)}, {fixed(interval[1], 1)}]"
    return fixed(cell["mean"], 1) + spread + ends
