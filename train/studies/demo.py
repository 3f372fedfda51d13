"""Evaluation and report of a demo: the benchmark, and the six types of dialogue before and after visual tuning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from parrot_sys.evaluation import plots
from parrot_sys.evaluation.headlines import Scores, average_interval, headlines, measure_of, metric_of, outcomes_of
from parrot_sys.evaluation.markdown import PAIRED, paired_table
from parrot_sys.evaluation.outcomes import compare_languages
from parrot_sys.evaluation.report import ReportInput, build_report, load_scores
from parrot_sys.fonts import explain_numbers
from parrot_sys.markdown_tables import fixed, percent, table
from studies import recipes
from studies.pipeline import Pipeline, Step
from studies.recipes import System


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluations:
    """Evaluations that the report of a demo is made of."""

    benchmark: Step
    before: Step
    """Dialogues, after the stage that reads text alone."""
    after: Step
    """The same dialogues, after the last stage."""
    attention: Step


def evaluate_demo(pipeline: Pipeline, system: System, stages: Sequence[Step], data: Step, *, limit: int) -> Evaluations:
    """Asks the first and the last stage.

    Args:
        pipeline: where the steps belong.
        system: the model.
        stages: training steps, in order.
        data: the data set.
        limit: dialogues of each type and language.
    """
    first, last = stages[0], stages[-1]
    routings = ["--routing", *system.routings]
    dialogues = {
        name: recipes.evaluate_dialogues(pipeline, system, model, data, name=f"dialogues-{name}", limit=limit)
        for name, model in (("before", first), ("after", last))
    }
    return Evaluations(
        benchmark=recipes.evaluate(pipeline, system, last, data, flags=routings),
        **dialogues,
        attention=recipes.measure_attention(pipeline, last, data, name="attention", limit=limit),
    )


def report_demo(pipeline: Pipeline, system: System, stages: Sequence[Step], evaluations: Evaluations) -> Step:
    """report.md, report.json and plots of everything."""
    runs = {stage.title: step.folder for stage, step in zip(system.stages, stages, strict=True)}

    def report(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        notes = [
            f"The demo's small model ({system.model}) on its default data. The benchmark asks every held-out question; "
            "of the dialogues a part is asked, also for the attention: n is shown beside each table."
        ]
        inputs = ReportInput(
            evaluation=evaluations.benchmark.folder,
            output=folder,
            runs=runs,
            title=f"{system.title} demo: held-out questions in each language",
            notes=notes,
            appendix=[*forgetting(evaluations, folder), *attention(evaluations.attention.folder, folder)],
        )
        build_report(inputs)

    before = [evaluations.benchmark, evaluations.before, evaluations.after, evaluations.attention]
    return pipeline.step("report", report, after=before)


def forgetting(evaluations: Evaluations, folder: Path) -> list[str]:
    """Section of the report: the six types before and after visual tuning, with a plot and forgetting.json."""
    before, after = load_scores(evaluations.before.folder), load_scores(evaluations.after.folder)
    runs = {name: _accuracies(scores) for name, scores in (("before", before), ("after", after))}
    change = {
        kind: {language: value - runs["before"][kind][language] for language, value in row.items()}
        for kind, row in runs["after"].items()
    }
    tests = {
        kind: compare_languages(
            *(outcomes_of(scores[kind]["model"], metric_of(scores[kind])) for scores in (after, before))
        )
        for kind in change
    }
    content = {**runs, "change": change, "paired": tests}
    (folder / "forgetting.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    rows = [_dialogue_row(kind, before, after, row) for kind, row in change.items()]
    legend = plots.means_with_spread(
        {name: {kind: list(row.values()) for kind, row in runs[name].items()} for name in runs},
        chance=25.0,
        title="Dialogues before and after visual tuning",
        path=folder / "forgetting.png",
        dots="languages",
    )
    measure = measure_of(after)
    languages = list(next(iter(change.values())))
    return [
        "## Six types of dialogue",
        "",
        "Accuracy in percent over languages after the stage that reads text alone (before) and after the last one; "
        f"guessing gives 25. {measure.answers} Each letter is a turn, T about words and V about a picture; the last "
        "one counts. What T, TT and TTT lose is text-only forgetting.",
        "",
        *table(
            [
                "type",
                "n, all languages",
                "before",
                "after",
                "change",
                *(f"change {language}" for language in languages),
            ],
            rows,
        ),
        "",
        f"After against before: {PAIRED}",
        "",
        *paired_table("type", tests, scale=100),
        "",
        "![Six types of dialogue before and after visual tuning](forgetting.png)",
        "",
        *([explain_numbers(legend), ""] if legend else []),
    ]


def _dialogue_row(kind: str, before: Scores, after: Scores, change: Mapping[str, float]) -> list[str]:
    return [
        kind,
        str(sum(result["scores"]["n"] for result in after[kind]["model"].values())),
        *(_mean(scores[kind]) for scores in (before, after)),
        fixed(fmean(change.values()), 1, sign=True),
        *(fixed(value, 1, sign=True) for value in change.values()),
    ]


def _accuracies(scores: Scores) -> dict[str, dict[str, float]]:
    return {kind: headlines(routings["model"]) for kind, routings in scores.items()}


def _mean(routings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean over languages with its interval."""
    languages = routings["model"]
    return percent(fmean(headlines(languages).values()), average_interval(languages, metric_of(routings)))


def attention(measured: Path, folder: Path) -> list[str]:
    """Section of the report: what `parrot attention` wrote, with its plot."""
    for name in ("attention.png", "attention.json"):
        shutil.copy(measured / name, folder / name)
    heading, *lines = (measured / "attention.md").read_text(encoding="utf-8").split("\n")
    return [f"#{heading}", *(f"#{line}" if line.startswith("#") else line for line in lines)]
