"""Parts of a model that are frozen, and get learning rates of their own, by name.

A part is told from the names of its parameters: some lie inside others (LoRA inside the decoder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from parrot_sys.errors import ConfigError

COMPONENTS = (
    "vision",
    "projector",
    "moe",
    "llm",
    "lora",
    "visual_learners",
    "textual_learners",
    "resampler",
    "cross_attention",
)
"""Names of the parts in configurations."""

_INSIDE = {
    ".lora.": "lora",
    ".visual_learner.": "visual_learners",
    ".textual_learner.": "textual_learners",
    ".learners.router.": "textual_learners",
    ".gated_cross_attention.": "cross_attention",
}
_TOP = {"vision_tower": "vision", "projector": "projector", "moe": "moe", "decoder": "llm", "resampler": "resampler"}


def component_of(name: str) -> str:
    """Part that a parameter of `MultimodalModel` belongs to, by its name there (as `named_parameters` gives it); "" for
    the name of anything else."""
    for mark, component in _INSIDE.items():
        if mark in name:
            return component
    return _TOP.get(name.partition(".")[0], "")


def component_parameters(model: nn.Module | Sequence[nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Parameters of each part that this rank holds; parts that the model does not have are empty."""
    chunks = [model] if isinstance(model, nn.Module) else model
    parts: dict[str, list[nn.Parameter]] = {name: [] for name in COMPONENTS}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts[component_of(name)].append(parameter)
    return parts


def set_trainable(model: nn.Module | Sequence[nn.Module], trainable: Mapping[str, bool]) -> None:
    """Freeze and unfreeze parts by name; parts that are not named stay as they are.

    Raises:
        ConfigError: for an unknown name.
    """
    if unknown := set(trainable) - set(COMPONENTS):
        raise ConfigError(f"parts of the model are {', '.join(COMPONENTS)}, got {', '.join(sorted(unknown))}")
    parameters = component_parameters(model)
    for name, value in trainable.items():
        for parameter in parameters[name]:
            parameter.requires_grad_(value)
