"""Routes in the reports of experiments: what they tell of language and category, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from parrot_sys.evaluation.report import load_scores
from parrot_sys.evaluation.routes import KINDS, measure_routes
from parrot_sys.markdown_tables import fixed, table


def routes_of(evaluation: Path) -> dict[str, Any]:
    """Part -> what `measure_routes` finds; parts without routes are absent."""
    found = {part: measure_routes(routings["model"]) for part, routings in load_scores(evaluation).items()}
    return {part: each for part, each in found.items() if each}


def routes_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], part: str) -> list[str]:
    """Information and usage of each variant over its seeds; no lines where no variant has routes.

    Args:
        results: variant -> seed -> record with `routes`.
        part: of the benchmark.
    """
    rows = []
    for name, seeds in results.items():
        runs = [record["routes"][part] for record in seeds.values() if part in record.get("routes", {})]
        if runs:
            told = [
                f"{spread_text([run[kind]['bits'] for run in runs], 2)} of {fixed(runs[0][kind]['most'], 2)} "
                f"(by chance {fixed(fmean(run[kind]['by_chance'] for run in runs), 3)})"
                if all(kind in run for run in runs)
                else "-"
                for kind in KINDS
            ]
            used = [spread_text([run[key] for run in runs], 2) for key in ("entropy", "picture_entropy")]
            rows.append([name, *told, *used, ", ".join(str(len(run["dead"])) for run in runs)])
    if not rows:
        return []
    header = ["routes (bits)", *(f"I(expert; {name})" for name in KINDS.values())]
    return table([*header, "H(expert)", "H of a picture", "dead experts of each seed"], rows)


def spread_text(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation, which one value has none of."""
    spread = f" \u00b1 {fixed(stdev(values), digits)}" if len(values) > 1 else ""
    return fixed(fmean(values), digits) + spread
