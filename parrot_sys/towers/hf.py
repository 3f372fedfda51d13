"""config.json of a vision tower -> VisionConfig, and the towers that checkpoints name by a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields, naming_file
from parrot_sys.towers.config import VisionConfig
from parrot_sys.towers.registry import TOWERS

KNOWN_TOWERS = {
    name: VisionConfig(type=tower.name, **settings)
    for tower in TOWERS.values()
    for name, settings in tower.known.items()
}
"""Last part of a hub id -> the tower's sizes."""


def vision_config_from_hf(
    hf: Mapping[str, Any], *, path: str | None = None, file: object = "vision tower"
) -> VisionConfig:
    """Tower configuration from the config.json (`file`) of a tower, or of a whole model that has one.

    Raises:
        ConfigError: the file describes another kind of model, or a field is of a wrong type.
    """
    fields = Fields(hf, file)
    if "vision_config" in fields:
        fields = fields.below("vision_config")
    kinds = {tower.transformer.model_type: tower for tower in TOWERS.values() if tower.transformer is not None}
    model_type = fields.get("model_type", str, "")
    if model_type not in kinds:
        raise ConfigError(f"{file}: model_type must be one of {sorted(kinds)}, got {model_type!r}")
    tower = kinds[model_type]
    assert tower.transformer is not None
    usual = tower.transformer
    for name in usual.refused:
        fields.require_value(name, False, "the tower here does nothing else")
    hidden_size = fields.get("hidden_size", int, 768)
    inner = int(hidden_size * fields.get("mlp_ratio", float, 4.0))
    with naming_file(file):
        return VisionConfig(
            type=tower.name,
            path=path,
            image_size=fields.get("image_size", int, 224),
            patch_size=fields.get("patch_size", int, usual.patch_size),
            hidden_size=hidden_size,
            num_layers=fields.get("num_hidden_layers", int, 12),
            num_attention_heads=fields.get("num_attention_heads", int, 12),
            ffn_hidden_size=fields.get("intermediate_size", int, inner if "mlp_ratio" in fields else 3072),
            activation=fields.get("hidden_act", str, usual.activation),
            layer_norm_eps=fields.get("layer_norm_eps", float, usual.layer_norm_eps),
        )


def vision_fields(vision: VisionConfig) -> dict[str, Any]:
    """Fields of a tower's config.json, the reverse of `vision_config_from_hf`; none of one that is no transformer."""
    if vision.tower.transformer is None:
        return {}
    return {
        "model_type": vision.tower.transformer.model_type,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.layer_norm_eps,
    }
