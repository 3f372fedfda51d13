"""Exported checkpoints of Parrot and Wings in vLLM: `register` is the entry point that it calls in each process."""

from __future__ import annotations


def register() -> None:
    """Makes configurations and models known."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from parrot_vllm.config import ARCHITECTURES, CONFIGURATIONS

    for kind, configuration in CONFIGURATIONS.items():
        AutoConfig.register(kind, configuration, exist_ok=True)
    for architecture, path in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
