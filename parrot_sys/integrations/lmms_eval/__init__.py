"""lmms-eval (0.7): the model `parrot`, and tasks from benchmark tables."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Entry point of lmms-eval, by which it knows the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "parrot_sys.integrations.lmms_eval.lmms_eval_model"
    return ModelManifest(model_id="parrot", simple_class_path=f"{module}.ParrotLMM")
