"""Everything that touches Megatron-Core, Transformer Engine or apex.

Importing this package does not import Megatron; it only prepares that import for machines without CUDA (`cpu_layer`),
which has to happen first. The names in `__all__` are for other people's Megatron pipelines (docs/embedding.md).
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from parrot_sys import platform
from parrot_sys.megatron.runtime import cpu_layer

_PUBLIC = {
    "GroupedExperts": "embed.moe_layer",
    "Norm": "norms",
    "TextGuidance": "embed.guidance",
    "TextGuidedLayer": "embed.text_guided",
    "TokenRouter": "embed.moe_layer",
    "add_text_guidance": "embed.text_guided",
    "learner_inputs": "embed.learners",
    "moe_layer_spec": "embed.moe_layer",
    "packed_sample_ids": "embed.guidance",
    "text_guidance": "embed.guidance",
    "text_guided_spec": "embed.text_guided",
    "with_grouped_experts": "embed.moe_layer",
    "with_learners": "embed.learner_layers",
    "with_norms": "norms",
}
"""Public name -> module that holds it."""

__all__ = sorted(_PUBLIC)

# Neither is needed here, and `python -m parrot_sys.info` says whether they are there.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning, module="megatron")
# A default of Megatron's own configuration.
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning, module="megatron")
if not platform.cuda_available():
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning, module="megatron")
cpu_layer.install()
if cpu_layer.is_installed():
    # Advice for a GPU, at every layer.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning, module="megatron")


def __getattr__(name: str) -> Any:
    # Lazy: importing Megatron costs seconds.
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
