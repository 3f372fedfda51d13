"""parrot_sys: training and serving of text-guided, expert-routed multimodal language models on Megatron-Core."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    # Lazy: importing Megatron costs seconds, and `import parrot_sys` must stay cheap.
    if name == "load_pretrained":
        from parrot_sys.inference.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
