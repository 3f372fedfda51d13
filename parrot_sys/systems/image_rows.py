"""Fields and names that released layouts of systems with image rows in the text share: those of LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.files import Fields, naming_file
from parrot_sys.models.llm import llm_maps
from parrot_sys.models.lora_maps import llm_lora_maps
from parrot_sys.models.tensor_map import TensorMap, copied
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.systems.config import ParrotConfig

NEW_FIELDS: Mapping[str, Any] = {
    "mm_patch_merge_type": "flat",
    "tokenizer_padding_side": "right",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""Fields that the released code reads besides the settings of ParrotConfig."""


def projector_from_hf(fields: Fields) -> ProjectorConfig:
    """Projector of a released config.json."""
    with naming_file(fields.file):
        return ProjectorConfig(type=fields.get("mm_projector_type", str, "linear"))


def image_fields(model: ParrotConfig) -> dict[str, Any]:
    """Fields of config.json about tower and projector."""
    return {
        "mm_vision_select_layer": model.vision.select_layer,
        "mm_hidden_size": model.vision.hidden_size,
        "mm_projector_type": model.projector.type,
        "mm_vision_select_feature": model.vision.select_feature,
        "use_mm_proj": True,
    }


def projector_maps(model: ParrotConfig, prefix: str = "projector.") -> list[TensorMap]:
    """Projector <-> `model.mm_projector.*` (`linear`: one layer without a number, as LLaVA saves it)."""
    hidden = model.llm.hidden_size
    maps = []
    for index in range(model.projector.depth):
        columns = model.vision.hidden_size if index == 0 else hidden
        released = "" if model.projector.type == "linear" else f"{2 * index}."
        maps.append(copied(f"{prefix}{2 * index}.weight", f"model.mm_projector.{released}weight", hidden, columns))
        maps.append(copied(f"{prefix}{2 * index}.bias", f"model.mm_projector.{released}bias", hidden))
    return maps


def image_rows_maps(model: ParrotConfig) -> list[TensorMap]:
    """Decoder with its updates, and projector <-> released names."""
    decoder = llm_maps(model.llm, "decoder.") + llm_lora_maps(model.llm, model.lora, "decoder.")
    return decoder + projector_maps(model)
