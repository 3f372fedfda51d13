"""config.json of the released layouts as vLLM reads it: the decoder's fields in a configuration of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from parrot_sys.systems.parrot.system import Parrot
from parrot_sys.systems.registry import RELEASED_TYPES
from parrot_sys.systems.wings.system import Wings

_CLASSES = {Parrot(): "parrot_vllm.model:ParrotForVllm", Wings(): "parrot_vllm.wings:WingsForVllm"}
ARCHITECTURES = {name: path for system, path in _CLASSES.items() for name in system.model_types.values()}
"""Of the models that are served -> their classes."""
_SERVED = tuple(kind for system in _CLASSES for kind in system.model_types)
_MISSING = {
    "multimodal_gpt": "its gated cross-attention needs memory of pictures in layers, and low-rank updates that are "
    "merged first",
}
"""Name of a system -> what it takes."""
_OTHER = "this plugin has no part for it"


def _served(kind: str, decoder: str, *, rows_differ: bool) -> type[PretrainedConfig]:
    """A configuration with the fields of the file, and those of the decoder again below `text_config`.

    Args:
        kind: model_type.
        decoder: model_type of the decoder.
        rows_differ: the model numbers the rows of a request itself, as M-RoPE models do (`wings.py`).
    """

    # (Each class has a constructor of its own: transformers gives one to every class without.)
    def __init__(self: PretrainedConfig, text_config: Any = None, **fields: Any) -> None:
        PretrainedConfig.__init__(self, **fields)
        if text_config is None:
            others = ("architectures", "model_type", "parrot_sys", "auto_map")
            own = {name: value for name, value in fields.items() if name not in others}
            text_config = AutoConfig.for_model(decoder, **own)
        self.text_config = text_config
        if rows_differ:
            self.mrope_section = [1]

    return _class(kind, __init__)


def _refused(kind: str, system: str) -> type[PretrainedConfig]:
    """A configuration that cannot be made."""

    def refuse(self: PretrainedConfig, **fields: Any) -> None:
        if not fields:  # transformers makes an empty one to compare with
            PretrainedConfig.__init__(self)
            return
        raise ValueError(
            f"model_type {kind!r}: parrot-vllm serves {', '.join(_SERVED)}; {system} is missing: "
            f"{_MISSING.get(system, _OTHER)}. Serve this checkpoint with `parrot serve`"
        )

    return _class(kind, refuse)


def _class(kind: str, constructor: Callable[..., None]) -> type[PretrainedConfig]:
    members = {"__module__": __name__, "model_type": kind, "__init__": constructor}
    return type(f"{kind.title().replace('_', '')}VllmConfig", (PretrainedConfig,), members)


CONFIGURATIONS: dict[str, type[PretrainedConfig]] = {
    kind: _served(kind, kind.removeprefix(f"{system.name}_"), rows_differ=isinstance(system, Wings))
    if kind in _SERVED
    else _refused(kind, system.name)
    for kind, system in RELEASED_TYPES.items()
    if kind not in CONFIG_MAPPING_NAMES  # vLLM reads the layouts of transformers itself
}
"""model_type -> class."""
globals().update({configuration.__name__: configuration for configuration in CONFIGURATIONS.values()})
