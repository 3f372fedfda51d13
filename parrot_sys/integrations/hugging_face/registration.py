"""Registration with the Auto classes: a function for each of the modules of transformers, called after its import."""

from __future__ import annotations

from parrot_sys.integrations.hugging_face.configuration import CONFIGURATIONS


def configuration() -> None:
    """A configuration for each released model_type."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for kind, own in CONFIGURATIONS.items():
        AutoConfig.register(kind, own)


def modeling() -> None:
    """Models: each answers to text and pictures, and is a causal language model."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

    from parrot_sys.integrations.hugging_face.modeling import MODELS

    for model in MODELS:
        AutoModelForCausalLM.register(model.config_class, model)
        AutoModelForImageTextToText.register(model.config_class, model)


def processing() -> None:
    """One processor for all of them."""
    from transformers.models.auto.processing_auto import AutoProcessor

    from parrot_sys.integrations.hugging_face.processing import ReleasedProcessor

    for own in CONFIGURATIONS.values():
        AutoProcessor.register(own, ReleasedProcessor)
