"""The experiments: for each system the variants that show what its own parts do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from parrot_sys.data.constants import LANGUAGES
from parrot_sys.evaluation import recipes
from parrot_sys.evaluation.experiment import Experiment, Run, Variant
from parrot_sys.evaluation.pipeline import Step
from parrot_sys.evaluation.recipes import ALIGN, INSTRUCT, PARROT, PRETRAIN, Stage
from parrot_sys.training.writer import read_metrics

_OTHERS = tuple(language for language in LANGUAGES if language != "en")
MIXES: Mapping[str, Mapping[str, float]] = {
    "balanced": {},
    "imbalanced": dict.fromkeys(_OTHERS, 0.1),
    "english": dict.fromkeys(_OTHERS, 0.0),
}
"""Mix -> how often an epoch of stages 1 and 2 takes each conversation of a language; 1 where not named."""


def run_parrot(run: Run, *, mix: str, experts: bool) -> Step:
    """Parrot or the same model without experts, on a mix of languages."""
    flags = run.seeded
    pretrain = recipes.train(run.pipeline, PARROT, PRETRAIN, run.data, name=run.name("pretrain"), flags=flags)
    align = _stage(run, ALIGN, pretrain, mix, "align", flags)
    if not experts:
        align = recipes.without_experts(run.pipeline, align, name=run.name(f"align-{mix}-plain"))
        flags += ["--model.moe.num-experts", "0"]
    kind = "experts" if experts else "plain"
    model = _stage(run, INSTRUCT, align, mix, f"instruct-{kind}", flags)
    return recipes.evaluate(run.pipeline, PARROT, model, run.data, name=run.name(f"evaluation-{kind}-{mix}"))


def _stage(run: Run, stage: Stage, start: Step, mix: str, name: str, flags: list[str]) -> Step:
    """One stage on one mix, with as many steps as the balanced mix takes."""
    named = run.name(f"{name}-{mix}")
    if mix == "balanced":
        return recipes.train(run.pipeline, PARROT, stage, run.data, start, name=named, flags=flags)
    steps = read_metrics(run.pipeline.root / run.name(f"{name}-balanced"), "train")[-1]["step"]
    weights = [text for language, weight in MIXES[mix].items() for text in (language, str(weight))]
    more = ["--data.language-weights", *weights, "--max-steps", str(steps)]
    return recipes.train(run.pipeline, PARROT, stage, run.data, start, name=named, flags=[*flags, *more])


def _parrot(name: str, description: str, mix: str, *, experts: bool) -> Variant:
    return Variant(name=name, description=description, evaluate=partial(run_parrot, mix=mix, experts=experts))


EXPERTS = Experiment(
    title="What the experts and the language mix do",
    about=(
        "Per seed, all variants share the text-pretrained decoder, and variants of one mix share the aligned projector, "
        "bit for bit; with and without experts differ in the instruction stage only. All take the same number of steps "
        "per stage. The variants without experts have fewer parameters."
    ),
    # (The balanced mix sets the number of steps, so it comes first.)
    variants=(
        _parrot("experts, balanced", "as in the demo", "balanced", experts=True),
        _parrot("plain, balanced", "routing off: projector only", "balanced", experts=False),
        _parrot("experts, imbalanced", "stages 1 and 2 with 10 % of the others", "imbalanced", experts=True),
        _parrot("plain, imbalanced", "the same, projector only", "imbalanced", experts=False),
        _parrot("experts, English only", "stages 1 and 2 in English only", "english", experts=True),
    ),
    comparisons=(
        ("experts - plain, balanced", "experts, balanced", "plain, balanced"),
        ("experts - plain, imbalanced", "experts, imbalanced", "plain, imbalanced"),
        ("balanced - imbalanced, experts", "experts, balanced", "experts, imbalanced"),
        ("balanced - English only, experts", "experts, balanced", "experts, English only"),
    ),
    file="experiment.json",
)
EXPERIMENTS: Mapping[str, Experiment] = {"parrot": EXPERTS}
"""System -> its experiment."""
