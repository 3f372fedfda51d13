"""parrot_sys: training and serving of text-guided, expert-routed multimodal language models on Megatron-Core."""

from __future__ import annotations

from typing import Any

from parrot_sys.import_hooks import when_imported
from parrot_sys.version import __version__

__all__ = ["__version__", "load_pretrained"]

# The Auto classes of transformers take exported checkpoints, and nothing is imported for that before they are.
for _kind in ("configuration", "modeling", "processing"):
    when_imported(
        f"transformers.models.auto.{_kind}_auto", f"parrot_sys.integrations.hugging_face.registration:{_kind}"
    )
when_imported("lm_eval.models", "parrot_sys.integrations.lm_eval:register")


def __getattr__(name: str) -> Any:
    # Lazy: importing Megatron costs seconds, and `import parrot_sys` must stay cheap.
    if name == "load_pretrained":
        from parrot_sys.inference.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
