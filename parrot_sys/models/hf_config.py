"""config.json of the released layouts (`model_type: parrot_qwen2`, `wings_qwen2`, `wings_llama`) <-> ParrotConfig.

Field names follow the public code (AIDC-AI/Parrot, parrot/model). Settings that the released layout cannot express
(routing `topk`, residual `paper`, ...) are kept leaf by leaf under the key `parrot_sys`, so that import after export
gives the same configuration and a released file stays as it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from parrot_sys.config_values import build, config_to_dict, merge, section_class
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.files import Fields, read_json
from parrot_sys.models.llm import LLMConfig
from parrot_sys.models.parrot import ParrotConfig
from parrot_sys.models.vision import Activation, VisionConfig
from parrot_sys.models.wings_hf import WINGS_TYPES, tensor_names, tower_as_stored, wings_fields, wings_from_hf
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.rotary import RopeScaling
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig

MODEL_TYPE = "parrot_qwen2"
MULTIMODAL_GPT = "multimodal_gpt"
"""model_type of MultiModal-GPT as `parrot convert` puts it together: LLaMA's config.json, its own parts below
`parrot_sys`."""
RELEASED_TYPES = (MODEL_TYPE, *WINGS_TYPES, MULTIMODAL_GPT)
"""model_type of every released layout; others are bare language models."""
OWN_KEY = "parrot_sys"
CONFIG = "config.json"
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


def llm_config_from_hf(hf: Mapping[str, Any] | Fields, file: object = CONFIG) -> LLMConfig:
    """Decoder configuration from the config.json (`file`) of a Qwen2 or LLaMA, or of a model with such a decoder.

    Raises:
        ConfigError: a field is missing or of a wrong type, or asks for something that the decoder here does not do.
    """
    fields = hf if isinstance(hf, Fields) else Fields(hf, file)
    is_llama = "llama" in fields.get("model_type", str, "")
    _only(fields, "hidden_act", "silu", "the decoder here does nothing else")
    for name in ("use_sliding_window", *(("attention_bias", "mlp_bias") if is_llama else ())):
        _only(fields, name, False, "the decoder here does nothing else")
    rope = fields.below("rope_parameters")
    heads = fields.require("num_attention_heads", int)
    hidden_size = fields.require("hidden_size", int)
    head_dim = fields.get("head_dim", int)
    scaling = fields.below("rope_scaling")
    with _named(fields.file):
        return LLMConfig(
            hidden_size=hidden_size,
            num_layers=fields.require("num_hidden_layers", int),
            num_attention_heads=heads,
            num_query_groups=fields.get("num_key_value_heads", int, heads),
            head_dim=None if head_dim is None or head_dim * heads == hidden_size else head_dim,
            ffn_hidden_size=fields.require("intermediate_size", int),
            vocab_size=fields.require("vocab_size", int),
            rope_base=fields.get("rope_theta", float, rope.get("rope_theta", float, 10_000.0)),
            rope_scaling=_rope_scaling(scaling if scaling.values else rope),
            norm_eps=fields.get("rms_norm_eps", float, 1e-6),
            max_position_embeddings=fields.get("max_position_embeddings", int, 2_048 if is_llama else 32_768),
            tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
            # Qwen2 has these biases and no such setting, LLaMA has neither.
            qkv_bias=fields.get("attention_bias", bool, not is_llama),
        )


@contextmanager
def _named(file: object) -> Iterator[None]:
    """Values that are out of range are told with the file that they stand in."""
    try:
        yield
    except ConfigError as error:
        raise (error if str(file) in str(error) else ConfigError(f"{file}: {error}")) from error


def _only(fields: Fields, name: str, wanted: Any, why: str) -> None:
    if fields.get(name, type(wanted), wanted) != wanted:
        raise ConfigError(f"{fields.wrong(name, repr(wanted))}; {why}")


_SCALING_FIELDS = {"factor": "factor", "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor"}
"""Our setting -> the one in `rope_scaling` of config.json."""


def _rope_scaling(fields: Fields) -> RopeScaling | None:
    kind = fields.get("rope_type", str, fields.get("type", str, "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{fields.file}: {fields.prefix}rope_type must be 'default' or 'llama3', got {kind!r}")
    return RopeScaling(
        **{ours: fields.require(theirs, float) for ours, theirs in _SCALING_FIELDS.items()},
        original_positions=fields.require("original_max_position_embeddings", int),
    )


def vision_config_from_hf(
    hf: Mapping[str, Any], *, path: str | None = None, file: object = "vision tower"
) -> VisionConfig:
    """Tower configuration from the config.json (`file`) of a CLIP or SigLIP (whole model or vision part).

    Raises:
        ConfigError: the file describes another kind of model, or a field is of a wrong type.
    """
    fields = Fields(hf, file)
    if "vision_config" in fields:
        fields = fields.below("vision_config")
    model_type = fields.get("model_type", str, "")
    kinds: dict[str, tuple[Any, str, float]] = {
        "clip_vision_model": ("clip", "quick_gelu", 1e-5),
        "siglip_vision_model": ("siglip", "gelu_pytorch_tanh", 1e-6),
    }
    if model_type not in kinds:
        raise ConfigError(f"{file}: model_type must be one of {sorted(kinds)}, got {model_type!r}")
    kind, activation, eps = kinds[model_type]
    default = VisionConfig()
    with _named(file):
        return VisionConfig(
            type=kind,
            path=path,
            image_size=fields.get("image_size", int, 224),
            patch_size=fields.get("patch_size", int, 32 if kind == "clip" else 16),
            hidden_size=fields.get("hidden_size", int, 768),
            num_layers=fields.get("num_hidden_layers", int, 12),
            num_attention_heads=fields.get("num_attention_heads", int, 12),
            ffn_hidden_size=fields.get("intermediate_size", int, 3072),
            activation=cast(Activation, fields.get("hidden_act", str, activation)),
            layer_norm_eps=fields.get("layer_norm_eps", float, eps),
            select_layer=default.select_layer,
        )


def find_tower_directory(hf: Mapping[str, Any], directory: Path) -> Path | None:
    """Directory of the vision tower: `mm_vision_tower` relative to the checkpoint, or `vision_tower` in it, or None."""
    named = Fields(hf, directory / CONFIG).get("mm_vision_tower", str, "")
    for candidate in (directory / (named or EXPORTED_TOWER), directory / EXPORTED_TOWER):
        if os.path.isfile(candidate / CONFIG):  # (Path.is_file raises for names that no file can have)
            return candidate.resolve()
    return None


def config_from_hf(hf: Mapping[str, Any], directory: Path) -> ParrotConfig:
    """ParrotConfig of a released checkpoint whose config.json (in `directory`) holds `hf`.

    Routing is dense whatever `moe_top_k` says: the released code stores that number and never uses it.

    Raises:
        ConfigError: a field is missing, or asks for something that Parrot does not do.
        CheckpointError: the vision tower's shape is nowhere to be found.
    """
    fields = Fields(hf, directory / CONFIG)
    model_type = fields.get("model_type", str, MODEL_TYPE)
    if model_type not in RELEASED_TYPES:
        raise fields.wrong("model_type", f"one of {', '.join(RELEASED_TYPES)}")
    _only(fields, "mm_patch_merge_type", "flat", "pictures are not cut into tiles here")
    _only(fields, "tokenizer_padding_side", "right", "logits of a batch are padded on the right here")
    own = fields.below(OWN_KEY)
    flamingo = model_type == MULTIMODAL_GPT
    llm = llm_config_from_hf(fields)
    vision, wings, limit = _vision(fields, directory, own.below("vision")), None, "tokenizer_model_max_length"
    if model_type in WINGS_TYPES:
        names, limit = tensor_names(directory), "tokenizer_max_length"
        vision, wings = tower_as_stored(vision, names), wings_from_hf(fields, names, llm.num_layers)
    projector = ProjectorConfig() if flamingo else ProjectorConfig(type=fields.get("mm_projector_type", str, "linear"))
    with _named(fields.file):
        config = ParrotConfig(
            vision=vision,
            projector=projector,
            moe=_moe_from_hf(fields, llm.hidden_size),
            llm=llm,
            wings=wings,
            template="instruction" if flamingo else "chatml",
            max_seq_len=fields.get(limit, int) or ParrotConfig().max_seq_len,
        )
    changes = {name: value for name, value in fields.get(OWN_KEY, dict, {}).items() if name != "vision"}
    return cast(ParrotConfig, _apply(config, changes, fields.file, own.prefix))


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


def _moe_from_hf(fields: Fields, hidden_size: int) -> TextGuidedMoEConfig:
    # Absent keys have the defaults of the released ParrotConfig; only a plain language model has no experts at all.
    if not fields.get("use_moe", bool, "moe_hidden_size" in fields or "num_experts" in fields):
        return TextGuidedMoEConfig(num_experts=0)
    if fields.get("moe_hidden_size", int, hidden_size) != hidden_size:
        raise fields.wrong("moe_hidden_size", f"{hidden_size} (hidden_size)")
    return TextGuidedMoEConfig(
        num_experts=fields.require("num_experts", int),
        ffn_hidden_size=fields.require("moe_intermediate_size", int),
        routing="dense",
        residual="code" if fields.get("use_moe_residual", bool, True) else "none",
        residual_weight=fields.get("moe_weight", float, 1.0),
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


def _vision(fields: Fields, directory: Path, own: Fields) -> VisionConfig:
    model_type = fields.get("model_type", str, "")
    select_layer = fields.get("mm_vision_select_layer", int, VisionConfig().select_layer)
    select_feature = fields.get("mm_vision_select_feature", str, "patch" if model_type in WINGS_TYPES else "cls_patch")
    name = fields.get("mm_vision_tower", str, "")
    tower = find_tower_directory(fields.values, directory)
    if tower is not None:
        base = vision_config_from_hf(read_json(tower / CONFIG), path=str(tower), file=tower / CONFIG)
    elif (known := KNOWN_TOWERS.get(Path(name).name)) is not None:
        base = known
    elif own.values:
        base = VisionConfig()
    else:
        raise CheckpointError(
            f"the vision tower {name!r} (mm_vision_tower) is neither a directory with a config.json relative to "
            f"{directory} nor one of {sorted(KNOWN_TOWERS)}; put the tower's config.json and preprocessor_config.json "
            f"into {directory / EXPORTED_TOWER}"
        )
    base = _apply(base, own.values, own.file, own.prefix)
    with _named(fields.file):
        return dataclasses.replace(
            base,
            select_layer=own.get("select_layer", int, select_layer),
            select_feature=own.get("select_feature", str, select_feature),
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


def _apply(config: Any, changes: Mapping[str, Any], file: object, prefix: str) -> Any:
    """`config` with (nested) settings of our own part of config.json laid over it."""
    merged: dict[str, Any] = {}
    merge(type(config), merged, config_to_dict(config), where="")
    merge(type(config), merged, _without_nulls(type(config), changes), where=f" in {file}", prefix=prefix)
    with _named(file):
        return build(type(config), merged, checked=True)


def _without_nulls(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `cls` without those that are null and may not be."""
    hints, kept = get_type_hints(cls), {}
    for name, value in values.items():
        section = section_class(hints.get(name))
        if section is not None and isinstance(value, Mapping):
            kept[name] = _without_nulls(section, value)
        elif value is not None or name not in hints or type(None) in get_args(hints[name]):
            kept[name] = value
    return kept
