"""The experiment on routers: which of them carry the language, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from studies import recipes
from studies.experiment import Experiment, Run, Variant
from studies.pipeline import Step
from studies.recipes import ALIGN, INSTRUCT, PARROT, PRETRAIN
from studies.route_tables import routes_of

_STEPS = 500
"""Steps of the instruction stage; an epoch has 1,260."""
_CONSTANTS = ("routing", "topk", "renormalize", "normalize_guidance", "router_scale", "expert_bias")
"""Settings of `model.moe` that the aligned projector has no part in."""
RELEASED = {"normalize-guidance": False, "router-scale": 1.0, "information-coeff": 0.0, "evenness-coeff": 0.0}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any] | None]] = {
    "projector only": ("no experts", None),
    "released": ("the released rule: dense, logits as they come, no auxiliary loss", RELEASED),
    "default": ("the demo's default: dense, scaled, information loss", {}),
    "default, top-2": ("the same with the two best experts of each image alone", {"routing": "topk", "topk": 2}),
}
"""Variant -> description, and settings of `model.moe` that differ from the default's."""


def router_flags(settings: Mapping[str, Any] | None) -> list[str]:
    """Settings of `parrot train` for a variant of `VARIANTS`."""
    if settings is None:
        return ["--model.moe.num-experts", "0"]
    flags: list[str] = []
    for key, value in settings.items():
        switch = f"--model.moe.{'' if value else 'no-'}{key}"
        flags += [switch] if isinstance(value, bool) else [f"--model.moe.{key}", str(value)]
    allowed = [f"model.moe.{name}" for key in settings if (name := key.replace("-", "_")) in _CONSTANTS]
    return [*flags, "--checkpoint.allow-differences", *allowed] if allowed else flags


def run_router(run: Run, *, name: str) -> Step:
    """The shared alignment, then the instruction stage with one router, and its evaluation."""
    settings, kind = VARIANTS[name][1], name.replace(",", "").replace(" ", "-")
    pretrain = recipes.train(run.pipeline, PARROT, PRETRAIN, run.data, name=run.name("pretrain"), flags=run.seeded)
    start = recipes.train(run.pipeline, PARROT, ALIGN, run.data, pretrain, name=run.name("align"), flags=run.seeded)
    flags = ["--max-steps", str(_STEPS), *run.seeded]
    if settings is None:
        start = recipes.without_experts(run.pipeline, start, name=run.name("align-plain"))
    flags += router_flags(settings)
    model = recipes.train(
        run.pipeline, PARROT, INSTRUCT, run.data, start, name=run.name(f"instruct-{kind}"), flags=flags, validate=True
    )
    return recipes.evaluate(run.pipeline, PARROT, model, run.data, name=run.name(f"evaluation-{kind}"))


ROUTERS = Experiment(
    title="Which routers carry the language",
    about=(
        f"Per seed, all variants share the aligned projector, the experts' initial weights and the decoder, bit for "
        f"bit; they differ in the {_STEPS} steps of the instruction stage. The variant without experts has fewer "
        "parameters."
    ),
    variants=tuple(
        Variant(name=name, description=description, evaluate=partial(run_router, name=name))
        for name, (description, _) in VARIANTS.items()
    ),
    comparisons=(
        ("default - projector only", "default", "projector only"),
        ("default - released", "default", "released"),
        ("default, top-2 - default", "default, top-2", "default"),
        ("released - projector only", "released", "projector only"),
    ),
    file="routers.json",
    folder="experiment-routers",
    routes=routes_of,
)
