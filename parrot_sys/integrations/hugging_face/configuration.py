"""config.json of the released layouts as transformers sees it: the fields as they are, a class for each model_type."""

from __future__ import annotations

from typing import ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from parrot_sys.systems.registry import RELEASED_TYPES


class ReleasedConfig(PreTrainedConfig):
    """Fields of a released config.json. What they mean is read from the file itself when the model is loaded."""

    architecture: ClassVar[str] = ""
    """Name of the model's class."""


def _class_of(kind: str, architecture: str) -> type[ReleasedConfig]:
    name = architecture.removesuffix("ForCausalLM") + "Config"
    return type(name, (ReleasedConfig,), {"__module__": __name__, "model_type": kind, "architecture": architecture})


CONFIGURATIONS: dict[str, type[ReleasedConfig]] = {
    kind: _class_of(kind, system.model_types[kind])
    for kind, system in RELEASED_TYPES.items()
    if kind not in CONFIG_MAPPING_NAMES
}
"""model_type -> class, without the layouts that are transformers' own."""
globals().update({configuration.__name__: configuration for configuration in CONFIGURATIONS.values()})
