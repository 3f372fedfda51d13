"""The experiments on what MultiModal-GPT is tuned on: pictures, text or both; long or also short answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from parrot_sys.files import replace_text
from studies import recipes
from studies.experiment import Experiment, Run, Variant
from studies.measures import answer_habits, habits_of_answers
from studies.pipeline import Step
from studies.recipes import MULTIMODAL_GPT
from studies.starts import cached

_STEPS = 180
"""Steps of the instruction stage."""
_DIALOGUES, _OPEN = 20, 10
"""Dialogues of each type and language; open questions of each split and language."""
_SPLIT = "seen_and_read"
"""Step that parts the conversations of the instruction stage by whether they have a picture."""
SETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "joint": ("half of the conversations about pictures, half about words", ("pictures.json", "words.json")),
    "vision only": ("conversations about pictures", ("pictures.json",)),
    "text only": ("conversations about words", ("words.json",)),
}
"""Name of what LoRA is tuned on -> description, and files of the step `_SPLIT`."""
LENGTHS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "long answers": ("name, category and keywords of what a picture shows", ("detail.json",)),
    "long and short answers": ("these, and as many answers that only name it", ("detail.json", "align.json")),
}
"""The same for sets of the data set, as it is built."""


def run_before(run: Run) -> Step:
    """The aligned model that all variants and seeds start from."""
    pretrain, align, _ = MULTIMODAL_GPT.stages
    flags = ["--checkpoint.keep-last", "1", *run.flags]
    text = recipes.train(run.pipeline, MULTIMODAL_GPT, pretrain, run.data, name="mmgpt/pretrain", flags=flags)
    return recipes.train(run.pipeline, MULTIMODAL_GPT, align, run.data, text, name="mmgpt/align", flags=flags)


def run_tuned(run: Run, *, kind: str) -> Step:
    """LoRA tuned on one of `SETS` or `LENGTHS`."""
    start, flags = run_before(run), ["--max-steps", str(_STEPS), *cached(run), *run.seeded]
    if kind in LENGTHS:
        records = LENGTHS[kind][1]
    else:
        counts, files = split(run), SETS[kind][1]
        records = tuple(f"../{_SPLIT}/{name}" for name in files)
        weights = [str(min(counts[name] for name in files) / counts[name]) for name in files]
        flags = ["--data.image-roots", str(run.data.folder), "--data.weights", *weights, *flags]
    name, stage = run.name(f"mmgpt-{kind.replace(' ', '-')}"), replace(MULTIMODAL_GPT.stages[-1], records=records)
    return recipes.train(run.pipeline, MULTIMODAL_GPT, stage, run.data, start, name=name, flags=flags)


def split(run: Run) -> dict[str, int]:
    """Writes pictures.json and words.json, and says how many conversations each has.

    Words are those of stage 0 as well as of the instruction stage, which has few without a picture.
    """

    def write(folder: Path) -> None:
        tuning, words = (_records(run.data.folder / name) for name in ("instruct.json", "text.json"))
        parts = {
            "pictures.json": [record for record in tuning if "image" in record],
            "words.json": [record for record in tuning if "image" not in record] + words,
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in parts.items():
            replace_text(folder / name, json.dumps(records, ensure_ascii=False) + "\n")

    done = run.pipeline.step(_SPLIT, write, after=[run.data])
    return {name: len(_records(done.folder / name)) for name in ("pictures.json", "words.json")}


def _records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def dialogues(run: Run, *, kind: str | None) -> Step:
    """Dialogues with the model before (None) or after tuning on some set."""
    model, name = _model(run, kind, "dialogues")
    return recipes.evaluate_dialogues(run.pipeline, MULTIMODAL_GPT, model, run.data, name=name, limit=_DIALOGUES)


def answers(run: Run, *, kind: str | None) -> Step:
    """Answers of the model to open questions about held-out pictures."""
    model, name = _model(run, kind, "answers")
    flags = ["--options", "hidden", "--limit", str(_OPEN)]
    return recipes.evaluate(run.pipeline, MULTIMODAL_GPT, model, run.data, name=name, mode="generate", flags=flags)


def _model(run: Run, kind: str | None, what: str) -> tuple[Step, str]:
    if kind is None:
        return run_before(run), f"mmgpt/{what}"
    return run_tuned(run, kind=kind), run.name(f"mmgpt-{what}-{kind.replace(' ', '-')}")


_ABOUT = (
    "All variants and seeds start from one aligned MultiModal-GPT, bit for bit; LoRA is tuned for "
    f"{_STEPS} steps, as in the paper on pictures and text together or on one of them alone."
)
_COMPARISONS = (
    ("joint - vision only", "joint", "vision only"),
    ("joint - text only", "joint", "text only"),
    ("joint - before", "joint", "before"),
    ("vision only - before", "vision only", "before"),
    ("text only - before", "text only", "before"),
)


def _variants(evaluate: Callable[..., Step], sets: Mapping[str, tuple[str, tuple[str, ...]]]) -> tuple[Variant, ...]:
    """Before and after tuning on each of the sets."""
    described = {"before": "aligned, not yet tuned", **{kind: description for kind, (description, _) in sets.items()}}
    return tuple(
        Variant(name=name, description=text, evaluate=partial(evaluate, kind=None if name == "before" else name))
        for name, text in described.items()
    )


JOINT = Experiment(
    title="Joint training of MultiModal-GPT: dialogues",
    about=f"{_ABOUT} Parts are the six types of dialogue (T a turn about words, V about a picture), options hidden.",
    variants=_variants(dialogues, SETS),
    comparisons=_COMPARISONS,
    file="joint.json",
    unit="accuracy in percent by the likelihood of the answers' texts",
)
ANSWERS = Experiment(
    title="MultiModal-GPT: length and repetition of answers",
    about=(
        f"{_ABOUT} Two more variants are tuned on long answers to open questions about pictures, and on these and as "
        "many short ones to the same questions, since the authors left out sets with short answers. Then open "
        "questions about held-out pictures are answered greedily, with at most 32 tokens."
    ),
    variants=_variants(answers, {**SETS, **LENGTHS}),
    comparisons=(*_COMPARISONS, ("long and short - long answers", "long and short answers", "long answers")),
    file="answers.json",
    unit="words in an answer, and percent of answers that repeat themselves",
    chance=None,
    measure=answer_habits,
    answers=habits_of_answers,
    scale=1.0,
)
