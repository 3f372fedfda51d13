"""Registration with the Auto classes: a function for each of the modules of transformers, called after its import."""

from __future__ import annotations

from typing import Any

from parrot_sys.integrations.hugging_face.configuration import CONFIGURATIONS, ReleasedConfig


def configuration() -> None:
    """A configuration for each released model_type."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for kind, own in CONFIGURATIONS.items():
        AutoConfig.register(kind, own)


def modeling() -> None:
    """Models: each answers to text and pictures, and is a causal language model."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

    for own in CONFIGURATIONS.values():
        model = _deferred(own)
        AutoModelForCausalLM.register(own, model)
        AutoModelForImageTextToText.register(own, model)


def _deferred(configuration: type[ReleasedConfig]) -> type:
    """A class that stands for the model of a configuration until somebody wants one.

    The import of a tokenizer imports the Auto classes of models, too, but not the two seconds of what a model needs.
    """

    def model() -> Any:
        from parrot_sys.integrations.hugging_face import modeling

        return getattr(modeling, configuration.architecture)

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return model().from_pretrained(*args, **kwargs)

    def from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
        return model()._from_config(*args, **kwargs)

    members: dict[str, Any] = {"__module__": __name__, "config_class": configuration}
    members |= {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(from_config)}
    return type(configuration.architecture, (), members)


def processing() -> None:
    """One processor for all of them."""
    from transformers.models.auto.processing_auto import AutoProcessor

    from parrot_sys.integrations.hugging_face.processing import ReleasedProcessor

    for own in CONFIGURATIONS.values():
        AutoProcessor.register(own, ReleasedProcessor)
