"""Trains the variants of a study one by one, and keeps what they give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies import recipes
from studies.experiment import Experiment, Run, Variant, compare_variants, experiment_content, summarize, write_result
from studies.experiment_report import write_report
from studies.pipeline import NotDone


def train_variants(
    chosen: Experiment, variants: Sequence[Variant], runs: Sequence[Run], folder: Path
) -> dict[str, Any]:
    """Trains and evaluates every variant from every seed, those of low rank first.

    Args:
        chosen: the study.
        variants: those of its variants that are wanted.
        runs: one for each seed.
        folder: for the records so far, written after each one, and at the end for the whole result and its report.

    Returns:
        The result; variants that are not done are absent where the pipeline only looks at what is.
    """
    content = experiment_content(chosen, recipes.provenance())
    evaluations: dict[str, dict[str, Path]] = {}
    order = sorted(((variant, run) for run in runs for variant in variants), key=lambda cell: cell[0].rank)
    for variant, run in order:
        try:
            step = variant.evaluate(run)
        except NotDone:
            continue
        evaluation = step.folder
        evaluations.setdefault(variant.name, {})[str(run.seed)] = evaluation
        accuracy, counts = chosen.measure(evaluation)
        record: dict[str, Any] = {"accuracy": accuracy, "n": counts, "commits": sorted(step.commits)}
        if chosen.routes is not None:
            record["routes"] = chosen.routes(evaluation)
        content["results"].setdefault(variant.name, {})[str(run.seed)] = record
        write_result(content, folder / chosen.file)
        print(f"{variant.name}, seed {run.seed}: " + ", ".join(f"{p} {a['mean']:.1f}" for p, a in accuracy.items()))
    if not evaluations:
        print("nothing is done yet")
        return content
    seconds = {step.name: step.seconds for run in runs for step in run.pipeline.steps}
    content["minutes"] = round(sum(seconds.values()) / 60)
    content["summary"] = summarize(content["results"], chosen.comparisons) | compare_variants(chosen, evaluations)
    write_result(content, folder / chosen.file)
    print("\n" + write_report(chosen, content, folder).read_text(encoding="utf-8"))
    return content
