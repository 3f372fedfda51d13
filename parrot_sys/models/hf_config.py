"""config.json of the released layouts (`model_type: parrot_qwen2`, `wings_qwen2`, `wings_llama`) <-> ParrotConfig.

Field names follow the public code (AIDC-AI/Parrot, parrot/model). Settings that the released layout cannot express
(routing `topk`, residual `paper`, ...) are kept leaf by leaf under the key `parrot_sys`, so that import after export
gives the same configuration and a released file stays as it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from parrot_sys.config_values import config_from_dict, config_to_dict, section_class
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.models.llm import LLMConfig
from parrot_sys.models.parrot import ParrotConfig
from parrot_sys.models.vision import VisionConfig
from parrot_sys.models.wings_hf import WINGS_TYPES, tensor_names, tower_as_stored, wings_fields, wings_from_hf
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig

MODEL_TYPE = "parrot_qwen2"
MULTIMODAL_GPT = "multimodal_gpt"
"""model_type of MultiModal-GPT as `parrot convert` puts it together: LLaMA's config.json, its own parts below
`parrot_sys`."""
OWN_KEY = "parrot_sys"
EXPORTED_TOWER = "vision_tower"
"""Folder inside an exported checkpoint with the tower's config.json and preprocessor_config.json."""

KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "clip-vit-large-patch14": VisionConfig(image_size=224),
    "siglip-so400m-patch14-384": VisionConfig(
        type="siglip",
        image_size=384,
        hidden_size=1152,
        num_layers=27,
        ffn_hidden_size=4304,
        activation="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
}
"""Towers that checkpoints name by their hub id, by the id's last part (sizes: the public config.json of each)."""

_NEW_CHECKPOINT: dict[str, Any] = {
    "mm_patch_merge_type": "flat",
    "tokenizer_padding_side": "right",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""What the released code reads besides the settings of ParrotConfig."""
_LOCAL_FIELDS = {"tokenizer_path", "path"}  # where files lie on this machine: not part of the model


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is no JSON or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a released-layout checkpoint has one") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def llm_config_from_hf(hf: Mapping[str, Any]) -> LLMConfig:
    """Decoder configuration from the config.json of a Qwen2 or LLaMA checkpoint, or of one with such a decoder.

    Raises:
        ConfigError: a field is missing, or asks for something that the decoder here does not do.
    """
    is_llama = "llama" in hf.get("model_type", "")
    unbiased = (("attention_bias", False), ("mlp_bias", False)) if is_llama else ()
    for name, wanted in (("hidden_act", "silu"), ("use_sliding_window", False), *unbiased):
        if hf.get(name, wanted) != wanted:
            raise ConfigError(f"config.json: {name} must be {wanted!r} for this decoder, got {hf[name]!r}")
    rope = hf.get("rope_parameters") or {}
    heads = _required(hf, "num_attention_heads")
    hidden_size = _required(hf, "hidden_size")
    head_dim = hf.get("head_dim")
    return LLMConfig(
        hidden_size=hidden_size,
        num_layers=_required(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads", heads),
        head_dim=None if head_dim is None or head_dim * heads == hidden_size else head_dim,
        ffn_hidden_size=_required(hf, "intermediate_size"),
        vocab_size=_required(hf, "vocab_size"),
        rope_base=float(hf["rope_theta"] if "rope_theta" in hf else rope.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(hf.get("rope_scaling") or rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        max_position_embeddings=hf.get("max_position_embeddings", 2_048 if is_llama else 32_768),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        # Qwen2 has these biases and no such setting, LLaMA has neither.
        qkv_bias=hf.get("attention_bias", not is_llama),
    )


_SCALING_FIELDS = {
    "factor": "factor",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
"""Our setting -> the one in `rope_scaling` of config.json."""


def _rope_scaling(hf: Mapping[str, Any]) -> RopeScaling | None:
    kind = hf.get("rope_type", hf.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"config.json: rope_scaling.rope_type must be 'default' or 'llama3', got {kind!r}")
    return RopeScaling(**{ours: _required(hf, theirs) for ours, theirs in _SCALING_FIELDS.items()})


def vision_config_from_hf(hf: Mapping[str, Any], *, path: str | None = None) -> VisionConfig:
    """Tower configuration from the config.json of a CLIP or SigLIP (whole model or vision part).

    Raises:
        ConfigError: the file describes another kind of model.
    """
    hf = hf.get("vision_config", hf)
    model_type = hf.get("model_type", "")
    kinds: dict[str, tuple[Any, str, float]] = {
        "clip_vision_model": ("clip", "quick_gelu", 1e-5),
        "siglip_vision_model": ("siglip", "gelu_pytorch_tanh", 1e-6),
    }
    if model_type not in kinds:
        raise ConfigError(f"vision tower: model_type must be one of {sorted(kinds)}, got {model_type!r}")
    kind, activation, eps = kinds[model_type]
    default = VisionConfig()
    return VisionConfig(
        type=kind,
        path=path,
        image_size=hf.get("image_size", 224),
        patch_size=hf.get("patch_size", 32 if kind == "clip" else 16),
        hidden_size=hf.get("hidden_size", 768),
        num_layers=hf.get("num_hidden_layers", 12),
        num_attention_heads=hf.get("num_attention_heads", 12),
        ffn_hidden_size=hf.get("intermediate_size", 3072),
        activation=hf.get("hidden_act", activation),
        layer_norm_eps=hf.get("layer_norm_eps", eps),
        select_layer=default.select_layer,
    )


def find_tower_directory(hf: Mapping[str, Any], directory: Path) -> Path | None:
    """Directory of the vision tower: `mm_vision_tower` relative to the checkpoint, or `vision_tower` in it, or None."""
    for candidate in (directory / (hf.get("mm_vision_tower") or EXPORTED_TOWER), directory / EXPORTED_TOWER):
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    return None


def config_from_hf(hf: Mapping[str, Any], directory: Path) -> ParrotConfig:
    """ParrotConfig of a released checkpoint whose config.json (in `directory`) holds `hf`.

    Routing is dense whatever `moe_top_k` says: the released code stores that number and never uses it.

    Raises:
        ConfigError: a field is missing, or asks for something that Parrot does not do.
        CheckpointError: the vision tower's shape is nowhere to be found.
    """
    kinds = (MODEL_TYPE, *WINGS_TYPES, MULTIMODAL_GPT)
    if hf.get("model_type", MODEL_TYPE) not in kinds:
        raise ConfigError(f"config.json: model_type must be one of {', '.join(kinds)}, got {hf['model_type']!r}")
    if hf.get("mm_patch_merge_type", "flat") != "flat":
        raise ConfigError(f"config.json: mm_patch_merge_type must be 'flat', got {hf['mm_patch_merge_type']!r}")
    if hf.get("tokenizer_padding_side", "right") != "right":
        raise ConfigError(
            f"config.json: tokenizer_padding_side must be 'right', got {hf['tokenizer_padding_side']!r}; "
            "logits of a batch are padded on the right here"
        )
    own = hf.get(OWN_KEY, {})
    flamingo = hf.get("model_type") == MULTIMODAL_GPT
    llm = llm_config_from_hf(hf)
    vision, wings, limit = _vision(hf, directory, own.get("vision", {})), None, "tokenizer_model_max_length"
    if hf.get("model_type") in WINGS_TYPES:
        names, limit = tensor_names(directory), "tokenizer_max_length"
        vision, wings = tower_as_stored(vision, names), wings_from_hf(hf, names, llm.num_layers)
    config = ParrotConfig(
        vision=vision,
        projector=ProjectorConfig() if flamingo else ProjectorConfig(type=hf.get("mm_projector_type", "linear")),
        moe=_moe_from_hf(hf, llm.hidden_size),
        llm=llm,
        wings=wings,
        template="instruction" if flamingo else "chatml",
        max_seq_len=hf.get(limit) or ParrotConfig().max_seq_len,
    )
    return _apply(config, {k: v for k, v in own.items() if k != "vision"}, OWN_KEY)


def config_to_hf(config: ParrotConfig, original: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """config.json for `config`, to be written into `directory` (whose tower folder, if any, is already there).

    `original`, the config.json the model came from, keeps its order and every field that ParrotConfig does not know.
    """
    hf = dict((_NEW_CHECKPOINT if config.flamingo is None else {}) if original is None else original)
    hf.pop(OWN_KEY, None)
    for name, value in _hf_fields(config).items():
        if name not in hf or hf[name] != value:
            hf[name] = value
    own: dict[str, Any] = {}
    try:
        plain = config_from_hf(hf, directory)
    except CheckpointError:  # the tower's shape is known from nowhere else: write it out in full
        own["vision"] = _leaves(config.vision)
        plain = config_from_hf({**hf, OWN_KEY: own}, directory)
    for name, difference in _difference(plain, config).items():
        own[name] = {**own[name], **difference} if isinstance(own.get(name), dict) else difference
    return {**hf, OWN_KEY: own} if own else hf


def _required(hf: Mapping[str, Any], name: str) -> Any:
    if name not in hf:
        raise ConfigError(f"config.json: {name} is missing; the decoder needs it")
    return hf[name]


def _moe_from_hf(hf: Mapping[str, Any], hidden_size: int) -> TextGuidedMoEConfig:
    # Absent keys have the defaults of the released ParrotConfig; only a plain language model has no experts at all.
    if not hf.get("use_moe", "moe_hidden_size" in hf or "num_experts" in hf):
        return TextGuidedMoEConfig(num_experts=0)
    if hf.get("moe_hidden_size", hidden_size) != hidden_size:
        raise ConfigError(
            f"config.json: moe_hidden_size must be {hidden_size} (hidden_size), got {hf['moe_hidden_size']}"
        )
    return TextGuidedMoEConfig(
        num_experts=_required(hf, "num_experts"),
        ffn_hidden_size=_required(hf, "moe_intermediate_size"),
        routing="dense",
        residual="code" if hf.get("use_moe_residual", True) else "none",
        residual_weight=hf.get("moe_weight", 1.0),
    )


def _hf_fields(config: ParrotConfig) -> dict[str, Any]:
    llm, moe = config.llm, config.moe
    fields: dict[str, Any] = {
        "architectures": ["ParrotQwen2ForCausalLM" if config.flamingo is None else "MultimodalGPT"],
        "model_type": MODEL_TYPE if config.flamingo is None else MULTIMODAL_GPT,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_query_groups,
        "intermediate_size": llm.ffn_hidden_size,
        "vocab_size": llm.vocab_size,
        "rope_theta": llm.rope_base,
        "rms_norm_eps": llm.norm_eps,
        "max_position_embeddings": llm.max_position_embeddings,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "tokenizer_model_max_length": config.max_seq_len,
        "mm_vision_select_layer": config.vision.select_layer,
    }
    if config.flamingo is None:
        fields |= {
            "mm_hidden_size": config.vision.hidden_size,
            "mm_projector_type": config.projector.type,
            "mm_vision_select_feature": config.vision.select_feature,
            "use_mm_proj": True,
        }
    else:
        fields["attention_bias"] = llm.qkv_bias
    if config.wings is not None:
        del fields["tokenizer_model_max_length"]
        fields |= wings_fields(config.wings, llm, config.rows_per_image, config.max_seq_len)
    elif config.flamingo is None:
        fields["use_moe"] = moe.num_experts > 0
    if llm.head_dim is not None:
        fields["head_dim"] = llm.head_dim
    if moe.num_experts:
        fields |= {
            "num_experts": moe.num_experts,
            "moe_hidden_size": llm.hidden_size,
            "moe_intermediate_size": moe.ffn_hidden_size,
            "use_moe_residual": moe.residual == "code",
            "moe_weight": moe.residual_weight,
        }
        if moe.routing == "topk":
            fields["moe_top_k"] = moe.topk
    return fields


def _vision(hf: Mapping[str, Any], directory: Path, own: Mapping[str, Any]) -> VisionConfig:
    select_layer = hf.get("mm_vision_select_layer", VisionConfig().select_layer)
    select_feature = hf.get("mm_vision_select_feature", "patch" if hf.get("model_type") in WINGS_TYPES else "cls_patch")
    name = hf.get("mm_vision_tower") or ""
    tower = find_tower_directory(hf, directory)
    if tower is not None:
        base = vision_config_from_hf(read_json(tower / "config.json"), path=str(tower))
    elif (known := KNOWN_TOWERS.get(Path(name).name)) is not None:
        base = known
    elif own:
        base = VisionConfig()
    else:
        raise CheckpointError(
            f"the vision tower {name!r} (mm_vision_tower) is neither a directory with a config.json relative to "
            f"{directory} nor one of {sorted(KNOWN_TOWERS)}; put the tower's config.json and preprocessor_config.json "
            f"into {directory / EXPORTED_TOWER}"
        )
    base = _apply(base, own, f"{OWN_KEY}.vision")
    return dataclasses.replace(
        base,
        select_layer=own.get("select_layer", select_layer),
        select_feature=own.get("select_feature", select_feature),
    )


def _leaves(config: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _LOCAL_FIELDS}


def _difference(base: Any, config: Any) -> dict[str, Any]:
    """Leaves of `config` that differ from `base`, nested as the dataclasses are."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(base, field.name)
        if field.name in _LOCAL_FIELDS or ours == theirs:
            continue
        if dataclasses.is_dataclass(ours) and theirs is None:  # an optional section, all of it
            result[field.name] = config_to_dict(ours)
        elif dataclasses.is_dataclass(ours):
            if nested := _difference(theirs, ours):
                result[field.name] = nested
        else:
            result[field.name] = ours
    return result


def _apply(config: Any, changes: Mapping[str, Any], where: str) -> Any:
    """`config` with the (nested) leaves of `changes` replaced."""
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - known):
        raise ConfigError(f"config.json: {where} has unknown settings {unknown}; known are {sorted(known)}")
    sections = get_type_hints(type(config))
    values = {}
    for name, value in changes.items():
        section = section_class(sections[name])
        if section is None or value is None:
            values[name] = tuple(value) if isinstance(value, list) else value
        elif (current := getattr(config, name)) is None:
            values[name] = config_from_dict(section, value)
        else:
            values[name] = _apply(current, value, f"{where}.{name}")
    return dataclasses.replace(config, **values)
