"""The experiment on Wings as a curve: what the decoder keeps of its text against what the model learns of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from studies import recipes
from studies.curves import Panel, Point, cells, draw
from studies.experiment import Experiment, Run, Variant
from studies.measures import AVERAGE
from studies.pipeline import Step
from studies.recipes import INSTRUCT, PLAIN, WINGS, System
from studies.starts import cached, text_decoder, text_model

_STEPS = 300
"""Steps of the instruction stage; an epoch has 1,260."""
_DIALOGUES = 20
"""Dialogues of each type and language."""
_TEXT, _PICTURES = ("T", "TT", "TTT"), ("V", "TV")
"""Types of dialogue whose means are the two axes."""
FAST, SLOW = "2e-3", "5e-5"
"""Rates of the decoder in the presets of a plain model and of Wings."""
RATES = (FAST, "5e-4", "0", "2e-4", SLOW)
"""Rate of the decoder; the other parts learn at 2e-3. The first ones are trained first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One way to read pictures."""

    description: str
    system: System
    align: tuple[str, ...] = ()
    """Further settings of the alignment."""
    instruct: tuple[str, ...] = ()
    """Further settings of the instruction stage."""


MODELS: Mapping[str, Model] = {
    "plain": Model(description="projector and decoder", system=PLAIN),
    "plain + LoRA": Model(
        description="the same with LoRA in the decoder's attention, as many parameters as the learners have",
        system=PLAIN,
        instruct=("--model.lora.rank", "64"),
    ),
    "Wings": Model(description="projector, learners and decoder", system=WINGS),
}
ABLATIONS: Mapping[str, Model] = {
    "Wings, visual learners only": Model(
        description="without textual learners and router",
        system=WINGS,
        instruct=("--bypass", "textual_learners"),
    ),
    "Wings, textual learners only": Model(
        description="the visual learners stay at the start, where they add nothing",
        system=WINGS,
        align=("--trainable.no-visual-learners",),
        instruct=("--trainable.no-visual-learners",),
    ),
    "Wings, router off": Model(
        description="both learners with one half each",
        system=WINGS,
        instruct=("--model.wings.routing", "even", "--checkpoint.allow-differences", "model.wings.routing"),
    ),
}
_ABLATION_RATE = "5e-4"


def run_text(run: Run) -> Step:
    """The decoder that all variants start from, before it sees a picture."""
    return _dialogues(run, PLAIN, text_model(run), "dialogues-text")


def run_model(run: Run, *, model: Model, rate: str, kind: str) -> Step:
    """Alignment and instruction from the shared decoder, by one preset in which the decoder has a rate of its own."""
    align = model.system.stages[1]
    name = "-".join(["align", model.system.name, *(each.strip("-") for each in model.align)])
    aligned = recipes.train(
        run.pipeline,
        model.system,
        align,
        run.data,
        text_decoder(run),
        name=run.name(name),
        flags=[*model.align, *run.seeded],
    )
    flags = ["--max-steps", str(_STEPS), *cached(run), *model.instruct, *_rate(rate), *run.seeded]
    named = run.name(f"{kind}-{rate}")
    trained = recipes.train(run.pipeline, model.system, INSTRUCT, run.data, aligned, name=named, flags=flags)
    return _dialogues(run, model.system, trained, run.name(f"dialogues-{kind}-{rate}"))


def _dialogues(run: Run, system: System, model: Step, name: str) -> Step:
    return recipes.evaluate_dialogues(run.pipeline, system, model, run.data, name=name, limit=_DIALOGUES)


def _rate(rate: str) -> tuple[str, ...]:
    """Settings of the decoder's rate; all rates fall to the same end."""
    learns = ("--trainable.no-llm",) if rate == "0" else ("--optimizer.lrs.llm", rate)
    return (*learns, "--optimizer.min-lr", "5e-6")


def _variant(name: str, model: Model, rate: str, rank: int) -> Variant:
    kind = name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")
    return Variant(
        name=f"{name}, {rate}",
        description=f"{model.description}; decoder at {rate}",
        evaluate=partial(run_model, model=model, rate=rate, kind=kind),
        rank=rank,
        at={"line": name, "rate": rate},
    )


def plot(content: Mapping[str, Any], folder: Path) -> Mapping[str, str]:
    """Text kept against pictures learned, one line a model, one point a rate."""

    def mean(record: Mapping[str, Any], parts: Sequence[str]) -> float:
        return fmean(record["accuracy"][part][AVERAGE] for part in parts)

    lines: dict[str, list[Point]] = {}
    for rate in sorted(RATES, key=float):
        for at, records in cells(content, rate=rate):
            x, y = ([mean(record, parts) for record in records] for parts in (_TEXT, _PICTURES))
            lines.setdefault(at["line"], []).append(Point(x=x, y=y, label=rate))
    if records := list(content["results"].get("text decoder", {}).values()):
        x, y = ([mean(record, parts) for record in records] for parts in (_TEXT, _PICTURES))
        lines["text decoder"] = [Point(x=x, y=y, label="before")]
    panel = Panel(
        title="numbers: rate of the decoder",
        x_label=f"text kept: mean of {', '.join(_TEXT)} (%)",
        y_label=f"pictures: mean of {', '.join(_PICTURES)} (%)",
        lines=lines,
    )
    if lines:
        draw([panel], folder / "tradeoff.png")
    return {"tradeoff.png": "Text kept against pictures learned, for each rate of the decoder"} if lines else {}


WINGS_CURVE = Experiment(
    title="Wings: text kept against pictures learned, over the decoder's rate",
    about=(
        "All variants and seeds start from one text-pretrained decoder, bit for bit, and see the same conversations: "
        f"an epoch of alignment, then {_STEPS} steps of instruction in which the decoder learns at the rate in the "
        "name (0: frozen) and all other parts at 2e-3. Parts are the six types of dialogue (T a turn about words, V "
        "about a picture, the last one counts), options hidden."
    ),
    variants=(
        Variant(name="text decoder", description="before it sees a picture", evaluate=run_text),
        *(
            _variant(name, MODELS[name], rate, rank)
            for (rank, rate), name in product(enumerate(RATES), ("Wings", "plain", "plain + LoRA"))
        ),
        *(_variant(name, model, _ABLATION_RATE, len(RATES)) for name, model in ABLATIONS.items()),
    ),
    comparisons=(
        (f"plain, {FAST} - text decoder", f"plain, {FAST}", "text decoder"),
        (f"Wings, {SLOW} - text decoder", f"Wings, {SLOW}", "text decoder"),
        (f"Wings, {SLOW} - plain, {FAST}", f"Wings, {SLOW}", f"plain, {FAST}"),
        *(
            (f"{first} - {second}, {rate}", f"{first}, {rate}", f"{second}, {rate}")
            for rate in RATES
            for first, second in (("Wings", "plain"), ("Wings", "plain + LoRA"))
        ),
        *(
            (f"Wings - {name.removeprefix('Wings, ')}", f"Wings, {_ABLATION_RATE}", f"{name}, {_ABLATION_RATE}")
            for name in ABLATIONS
        ),
    ),
    file="wings_curve.json",
    unit="accuracy in percent by the likelihood of the answers' texts",
    plot=plot,
)
