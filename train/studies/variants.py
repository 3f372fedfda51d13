"""The experiments: for each system the variants that show what its own parts do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.training.writer import read_metrics
from studies import recipes
from studies.experiment import Experiment, Run, Variant
from studies.joint import JOINT, JOINT_ANSWERS
from studies.languages import LANGUAGES
from studies.measures import answer_lengths, counted_words
from studies.pipeline import Step
from studies.recipes import (
    ALIGN,
    INSTRUCT,
    MULTIMODAL_GPT,
    PARROT,
    PLAIN,
    PRETRAIN,
    WINGS,
    Stage,
    System,
)
from studies.router import ROUTERS
from studies.starts import SLOW, text_decoder, text_model
from studies.tradeoff import WINGS_CURVE

_OTHERS = tuple(language for language in MMMB_LANGUAGES if language != "en")
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
        "Per seed, all variants share the text-pretrained decoder, and variants of one mix share the aligned "
        "projector, bit for bit; with and without experts differ in the instruction stage only. All take the same "
        "number of steps per stage. The variants without experts have fewer parameters."
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
_FORGETTING_STEPS = 300
"""Steps of the instruction stage; an epoch has 1,260."""
_DIALOGUES = 30
"""Dialogues of each type and language."""


def run_text(run: Run) -> Step:
    """The decoder that all variants start from, before it sees a picture."""
    return recipes.evaluate_dialogues(
        run.pipeline, PLAIN, text_model(run), run.data, name="text-dialogues", limit=_DIALOGUES
    )


def run_forgetting(run: Run, *, system: System, kind: str, rates: tuple[str, ...] = ()) -> Step:
    """Alignment and instruction of one system from the shared decoder."""
    _, align, instruct = system.stages
    name = run.name(f"align-{system.name}")
    aligned = recipes.train(run.pipeline, system, align, run.data, text_decoder(run), name=name, flags=run.seeded)
    flags = ["--max-steps", str(_FORGETTING_STEPS), *rates, *run.seeded]
    name = run.name(f"instruct-{kind}")
    model = recipes.train(run.pipeline, system, instruct, run.data, aligned, name=name, flags=flags)
    name = run.name(f"dialogues-{kind}")
    return recipes.evaluate_dialogues(run.pipeline, system, model, run.data, name=name, limit=_DIALOGUES)


FORGETTING = Experiment(
    title="What visual tuning costs in questions about text, and what the learners of Wings keep",
    about=(
        "All variants and seeds start from one text-pretrained decoder, bit for bit, and see the same conversations, "
        f"of which 7 % have no picture: one epoch of alignment, then {_FORGETTING_STEPS} steps of instruction. The "
        "parts are the six types of dialogue (T a turn about words, V about a picture, the last one counts), options "
        "hidden. The decoder of Wings learns at a fortieth of the rate of the plain model; the plain model with its "
        "decoder at that rate shows what the rate alone does."
    ),
    variants=(
        Variant(name="text decoder", description="before it sees a picture", evaluate=run_text),
        Variant(
            name="plain",
            description="projector, then projector and decoder",
            evaluate=partial(run_forgetting, system=PLAIN, kind="plain"),
        ),
        Variant(
            name="plain, slow decoder",
            description="the same, the decoder at a fortieth of the rate",
            evaluate=partial(run_forgetting, system=PLAIN, kind="plain-slow", rates=SLOW),
        ),
        Variant(
            name="Wings",
            description="projector and visual learners, then everything, the decoder at a fortieth of the rate",
            evaluate=partial(run_forgetting, system=WINGS, kind="wings"),
        ),
    ),
    comparisons=(
        ("plain - text decoder", "plain", "text decoder"),
        ("plain, slow decoder - text decoder", "plain, slow decoder", "text decoder"),
        ("Wings - text decoder", "Wings", "text decoder"),
        ("Wings - plain", "Wings", "plain"),
        ("Wings - plain, slow decoder", "Wings", "plain, slow decoder"),
    ),
    file="forgetting.json",
    folder="experiment-wings",
)


def run_answers(run: Run, *, kind: str, records: tuple[str, ...]) -> Step:
    """MultiModal-GPT, its LoRA tuned on some sets; evaluated by what it says to open questions about pictures."""
    pretrain, align, instruct = MULTIMODAL_GPT.stages
    text = recipes.train(run.pipeline, MULTIMODAL_GPT, pretrain, run.data, name="pretrain", flags=run.flags)
    name = run.name("align")
    aligned = recipes.train(run.pipeline, MULTIMODAL_GPT, align, run.data, text, name=name, flags=run.seeded)
    name, stage = run.name(f"instruct-{kind}"), replace(instruct, records=records)
    flags = ["--max-steps", str(_ANSWER_STEPS), *run.seeded]
    model = recipes.train(run.pipeline, MULTIMODAL_GPT, stage, run.data, aligned, name=name, flags=flags)
    flags, name = ["--options", "hidden", "--limit", str(_DIALOGUES)], run.name(f"answers-{kind}")
    return recipes.evaluate(run.pipeline, MULTIMODAL_GPT, model, run.data, name=name, mode="generate", flags=flags)


_ANSWER_STEPS = 180
"""Steps of the instruction stage: an epoch of one set."""
ANSWERS = Experiment(
    title="What a set of short answers does to the length of answers",
    about=(
        "MultiModal-GPT's authors left out sets with short answers, as these make it terse. LoRA is tuned for "
        f"{_ANSWER_STEPS} steps on long answers (name, category and keywords) to open questions about pictures, or on "
        "these and as many short ones (the name) to the same questions; then it is asked about held-out pictures."
    ),
    variants=(
        Variant(
            name="long answers",
            description="detail.json",
            evaluate=partial(run_answers, kind="long", records=("detail.json",)),
        ),
        Variant(
            name="long and short answers",
            description="detail.json and align.json",
            evaluate=partial(run_answers, kind="both", records=("detail.json", "align.json")),
        ),
    ),
    comparisons=(("long and short - long answers", "long and short answers", "long answers"),),
    file="answers.json",
    folder="experiment-multimodal_gpt",
    unit="words in an answer",
    chance=None,
    measure=answer_lengths,
    answers=counted_words,
    scale=1.0,
)
EXPERIMENTS: Mapping[str, Experiment] = {
    "parrot": EXPERTS,
    "routers": ROUTERS,
    "wings": FORGETTING,
    "multimodal_gpt": ANSWERS,
    "languages": LANGUAGES,
    "wings_curve": WINGS_CURVE,
    "joint": JOINT,
    "joint_answers": JOINT_ANSWERS,
}
"""Name of a study -> its experiment; the first one of a system is called as the system is."""
