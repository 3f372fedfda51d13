"""The experiment on languages: which routers carry the language, and where experts by language help.

question                          cells (each from three seeds)
does a frozen decoder need them   frozen decoder, six languages, both mixes: projector, default, wide, dense
which routers carry the language  tuned decoder, six languages, balanced: projector, default, dense
how freely the decoder learns     six languages, imbalanced: projector and default with LoRA, slow and tuned decoders
how many languages                frozen decoder, imbalanced: projector and default with 24 and 48 languages
other routers                     frozen decoder, six languages, imbalanced: a bias, a schedule of the scale, entropy
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from parrot_sys.data.corpora.default.offered import OFFERED
from studies import recipes
from studies.curves import Panel, Point, cells, draw
from studies.experiment import Experiment, Run, Variant
from studies.measures import EXCEPT_EN
from studies.pipeline import Step
from studies.recipes import ALIGN, INSTRUCT, PARROT
from studies.route_tables import routes_of
from studies.starts import SLOW, cached, text_decoder

_ALIGN_STEPS = 180
"""Steps of the alignment: an epoch of six languages."""
_STEPS = 500
"""Steps of the instruction stage; an epoch of six languages has 1,260."""
_PART = "style"
"""Split that is plotted: known things, in a style that no training picture has."""
_SHARE = 0.1
"""How often an imbalanced epoch takes a conversation that is not English."""
_QUESTIONS = 720
"""Questions that are asked in all languages together, and about things in a new style, at least."""

RELEASED = {"normalize-guidance": False, "router-scale": 1.0, "information-coeff": 0.0, "evenness-coeff": 0.0}
MODELS: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    "projector": ("the projector alone", None),
    "default": ("six experts, chosen by the default router", {}),
    "dense": ("six experts under the released rule, whose routes stay uniform", RELEASED),
    "bias": (
        "the one best expert of six, balanced by a bias without a loss of evenness",
        {
            **{"routing": "topk", "topk": 1, "renormalize": False},
            **{"evenness-coeff": 0.0, "expert-bias": True, "bias-update-rate": 0.01},
        },
    ),
    "sharpening": (
        "the default router, whose scale begins at 1",
        {"router-scale-start": 1.0, "router-scale-steps": 250},
    ),
    "entropy": (
        "the default router with a loss of each picture's entropy in place of that of information",
        {"information-coeff": 0.0, "entropy-coeff": 0.02},
    ),
    "wide": (
        "one expert for everything, as wide as the six together: as many trained parameters, and no choice",
        {"num-experts": 1, "ffn-hidden-size": 6 * 192, **RELEASED},
    ),
}
"""Model -> description, and settings of `model.moe` that differ from the default's; None for none."""
_CONSTANTS = ("routing", "topk", "renormalize", "normalize_guidance", "router_scale", "expert_bias")
"""Settings of `model.moe` that the aligned projector has no part in."""
DECODERS: Mapping[str, tuple[str, ...]] = {
    "frozen": ("--trainable.no-llm",),
    "LoRA": ("--trainable.no-llm", "--model.lora.rank", "16"),
    "slow": SLOW,
    "tuned": (),
}
"""Decoder in the instruction stage, in order of how freely it learns -> settings of `parrot train`."""
MIXES = ("imbalanced", "balanced")
COUNTS: Mapping[int, tuple[str, ...]] = {
    6: (),
    24: ("--align-rounds", "1", "--instruct-rounds", "4", "--vocab-size", "8192"),
    48: ("--align-rounds", "1", "--instruct-rounds", "2", "--vocab-size", "8192"),
}
"""Languages -> further settings of `parrot data build`. A language has as much text in stage 0, whatever their
number: what a decoder has not learned before it is frozen no projector or expert can bring. Stages 1 and 2 take as many
steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One point of the grid."""

    model: str
    decoder: str = "frozen"
    languages: int = 6
    mix: str = "imbalanced"
    rank: int
    """Cells of lower ranks come first."""

    @property
    def name(self) -> str:
        """Of the variant."""
        return f"{self.model}, {self.place}"

    @property
    def place(self) -> str:
        """Settings that cells which are compared have in common."""
        return f"{self.decoder} decoder, {self.languages} languages, {self.mix}"


CELLS = (
    *(Cell(model=model, mix=mix, rank=0) for mix, model in product(MIXES, ("projector", "default"))),
    *(Cell(model=model, mix=mix, rank=1) for mix, model in product(MIXES, ("wide", "dense"))),
    *(Cell(model=model, decoder="tuned", mix="balanced", rank=2) for model in ("projector", "default", "dense")),
    *(
        Cell(model=model, decoder=decoder, rank=2)
        for decoder, model in product(("tuned", "LoRA", "slow"), ("projector", "default"))
    ),
    *(
        Cell(model=model, languages=count, rank=3 + number)
        for number, count in enumerate((24, 48))
        for model in ("projector", "default")
    ),
    *(Cell(model=model, rank=5) for model in ("bias", "sharpening", "entropy")),
)


def run_cell(run: Run, *, cell: Cell) -> Step:
    """The shared decoder, the alignment of this mix, then the instruction stage of one model, and its evaluation."""
    count = cell.languages
    if count != 6:
        of_data = ("--languages", *OFFERED[:count], *COUNTS[count], *run.data_flags)
        data = recipes.build_data(run.pipeline, of_data, name=f"{count}/data")
        vocabulary = ("--model.llm.vocab-size", "8192")
        run = replace(run, data=data, flags=(*vocabulary, *run.flags), folder=f"{count}/")
    router = MODELS[cell.model][1]
    mix = _mix(cell)
    flags, name = ["--max-steps", str(_ALIGN_STEPS), *mix, *run.seeded], run.name(f"align-{cell.mix}")
    start = recipes.train(run.pipeline, PARROT, ALIGN, run.data, text_decoder(run), name=name, flags=flags)
    if router is None:
        start = recipes.without_experts(run.pipeline, start, name=run.name(f"align-{cell.mix}-plain"))
    elif "num-experts" in router:
        start = recipes.with_one_expert(run.pipeline, start, name=run.name(f"align-{cell.mix}-wide"))
    kind = f"{cell.model}-{cell.decoder}-{cell.mix}"
    flags = ["--max-steps", str(_STEPS), *cached(run), *mix, *run.seeded]
    flags += [*DECODERS[cell.decoder], *router_flags(router)]
    model = recipes.train(run.pipeline, PARROT, INSTRUCT, run.data, start, name=run.name(kind), flags=flags)
    limit = ["--limit", str(max(2, _QUESTIONS // count))] if count != 6 else []
    return recipes.evaluate(run.pipeline, PARROT, model, run.data, name=run.name(f"evaluation-{kind}"), flags=limit)


def router_flags(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings of `parrot train` for a model of `MODELS`."""
    if settings is None:
        return ["--model.moe.num-experts", "0"]
    flags: list[str] = []
    for key, value in settings.items():
        switch = f"--model.moe.{'' if value else 'no-'}{key}"
        flags += [switch] if isinstance(value, bool) else [f"--model.moe.{key}", str(value)]
    allowed = [f"model.moe.{name}" for key in settings if (name := key.replace("-", "_")) in _CONSTANTS]
    return [*flags, "--checkpoint.allow-differences", *allowed] if allowed else flags


def _mix(cell: Cell) -> list[str]:
    if cell.mix == "balanced":
        return []
    others = [language for language in OFFERED[: cell.languages] if language != "en"]
    return ["--data.language-weights", *(text for language in others for text in (language, str(_SHARE)))]


def plot(content: Mapping[str, Any], folder: Path) -> Mapping[str, str]:
    """Accuracy of all languages but English, and the information in routes, along both axes of the grid."""

    def accuracy(record: Mapping[str, Any]) -> float:
        return record["accuracy"][_PART][EXCEPT_EN]

    def bits(record: Mapping[str, Any]) -> float | None:
        routes = record.get("routes", {}).get(_PART)
        return None if routes is None else routes["language"]["bits"]

    measures: Sequence[tuple[str, Callable[[Mapping[str, Any]], float | None], tuple[float, float] | None]] = (
        (f"languages but English: {_PART} (%; {content['chance']:.0f} by chance)", accuracy, None),
        ("I(expert; language), bits", bits, (0.0, math.log2(6))),  # there are six experts
    )
    axes: Sequence[tuple[str, str, Mapping[str, Any], Sequence[Any]]] = (
        ("decoder", "6 languages, imbalanced", {"languages": 6}, list(DECODERS)),
        ("languages", "frozen decoder, imbalanced", {"decoder": "frozen"}, list(COUNTS)),
    )
    panels = []
    for axis, title, fixed, values in axes:
        for y_label, measure, limits in measures:
            lines: dict[str, list[Point]] = {}
            for value in values:
                for at, records in cells(content, mix="imbalanced", **fixed, **{axis: value}):
                    if held := [y for record in records if (y := measure(record)) is not None]:
                        lines.setdefault(at["line"], []).append(Point(x=[values.index(value)], y=held))
            ticks = {float(place): str(value) for place, value in enumerate(values)}
            panels.append(Panel(title=title, x_label=axis, y_label=y_label, lines=lines, ticks=ticks, limits=limits))
    if not any(panel.lines for panel in panels):
        return {}
    draw(panels, folder / "languages.png")
    return {"languages.png": "Accuracy and information in routes against the decoder's freedom and the languages"}


def _comparisons() -> tuple[tuple[str, str, str], ...]:
    """Models with each other in every place where both are, and each model with itself on the other mix."""
    names, pairs = (
        {cell.name for cell in CELLS},
        (
            ("default", "projector"),
            ("default", "wide"),
            ("default", "dense"),
            ("wide", "projector"),
            ("dense", "projector"),
            *((router, other) for router in ("bias", "sharpening", "entropy") for other in ("projector", "default")),
        ),
    )
    of_models = (
        (f"{first} - {second}, {place}", f"{first}, {place}", f"{second}, {place}")
        for place in dict.fromkeys(cell.place for cell in CELLS)
        for first, second in pairs
    )
    of_mixes = (
        (f"balanced - imbalanced, {model}, {place}", f"{model}, {place}, balanced", f"{model}, {place}, imbalanced")
        for place in ("frozen decoder, 6 languages", "tuned decoder, 6 languages")
        for model in MODELS
    )
    return tuple(each for each in (*of_models, *of_mixes) if set(each[1:]) <= names)


LANGUAGES = Experiment(
    title="Where experts by language help: routers, how freely the decoder learns, and how many languages there are",
    about=(
        "All variants and seeds start from one text-pretrained decoder, bit for bit; per seed and mix, all share the "
        f"aligned projector and differ in the {_STEPS} steps of the instruction stage. Imbalanced stages 1 and 2 take "
        f"{_SHARE:.0%} of the conversations that are not English. With 24 and 48 languages the decoder has "
        "seen as much text in each, and both stages have as many steps, so that each language has fewer; their "
        "questions differ in form (docs/data.md), and there are six experts."
    ),
    variants=tuple(
        Variant(
            name=cell.name,
            description=MODELS[cell.model][0],
            evaluate=partial(run_cell, cell=cell),
            rank=cell.rank,
            at={"line": cell.model, "decoder": cell.decoder, "languages": cell.languages, "mix": cell.mix},
        )
        for cell in CELLS
    ),
    comparisons=_comparisons(),
    file="languages.json",
    routes=routes_of,
    plot=plot,
)
