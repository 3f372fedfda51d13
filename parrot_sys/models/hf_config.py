"""config.json of the released layouts (`model_type: parrot_qwen2`, `wings_llama`, ...) <-> ParrotConfig.

Field names follow the public code (AIDC-AI/Parrot, parrot/model). Settings that the released layout cannot express
(routing `topk`, residual `paper`, ...) are kept leaf by leaf under the key `parrot_sys`, so that import after export
gives the same configuration and a released file stays as it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from parrot_sys.config_values import build, config_to_dict, merge, section_class
from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, naming_file, read_json
from parrot_sys.models.llm import FAMILIES, DecoderFamily, LLMConfig, llm_config_from_hf, llm_fields
from parrot_sys.models.parrot import ParrotConfig
from parrot_sys.models.wings_hf import WINGS_TYPES, tensor_names, tower_as_stored, wings_fields, wings_from_hf
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig
from parrot_sys.towers import KNOWN_TOWERS, VisionConfig, vision_config_from_hf

PARROT_TYPES = {f"parrot_{family.name}": f"Parrot{family.architecture}ForCausalLM" for family in FAMILIES.values()}
"""model_type of a Parrot checkpoint -> its architecture; the public code knows `parrot_qwen2` alone."""
MULTIMODAL_GPT = "multimodal_gpt"
"""model_type of MultiModal-GPT as `parrot convert` puts it together: LLaMA's config.json, its own parts below
`parrot_sys`, where `llm.family` names another decoder."""
RELEASED_TYPES = (*PARROT_TYPES, *WINGS_TYPES, MULTIMODAL_GPT)
"""model_type of every released layout; others are bare language models."""
OWN_KEY = "parrot_sys"
CONFIG = "config.json"
EXPORTED_TOWER = "vision_tower"
"""Folder inside an exported checkpoint with the tower's config.json and preprocessor_config.json."""

_NEW_CHECKPOINT: dict[str, Any] = {
    "mm_patch_merge_type": "flat",
    "tokenizer_padding_side": "right",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
"""Fields that the released code reads besides the settings of ParrotConfig."""
_LOCAL_FIELDS = {"tokenizer_path", "path"}  # where files lie on this machine: not part of the model


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
    model_type = fields.get("model_type", str, "parrot_qwen2")
    if model_type not in RELEASED_TYPES:
        raise fields.wrong("model_type", f"one of {', '.join(RELEASED_TYPES)}")
    fields.require_value("mm_patch_merge_type", "flat", "pictures are not cut into tiles here")
    fields.require_value("tokenizer_padding_side", "right", "logits of a batch are padded on the right here")
    own = fields.below(OWN_KEY)
    flamingo = model_type == MULTIMODAL_GPT
    llm = llm_config_from_hf(fields, family=_family(fields, own))
    vision, wings, limit = _vision(fields, directory, own.below("vision")), None, "tokenizer_model_max_length"
    if model_type in WINGS_TYPES:
        names, limit = tensor_names(directory), "tokenizer_max_length"
        vision, wings = tower_as_stored(vision, names), wings_from_hf(fields, names, llm.num_layers)
    with naming_file(fields.file):
        kind = fields.get("mm_projector_type", str, "linear")
        projector = ProjectorConfig() if flamingo else ProjectorConfig(type=kind)
    with naming_file(fields.file):
        config = ParrotConfig(
            vision=vision,
            projector=projector,
            moe=_moe_from_hf(fields, llm),
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


def _family(fields: Fields, own: Fields) -> DecoderFamily:
    """Family of a released checkpoint's decoder: the end of its type; MultiModal-GPT says it in its own part."""
    model_type = fields.get("model_type", str, "parrot_qwen2")
    if model_type != MULTIMODAL_GPT:
        return FAMILIES[model_type.split("_", 1)[1]]
    # Written before there were families: only these two, told apart by the biases.
    before = "qwen2" if fields.get("attention_bias", bool, False) else "llama"
    llm = own.below("llm")
    name = llm.get("family", str, before)
    if name not in FAMILIES:
        raise llm.wrong("family", f"one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def holds_experts(hf: Mapping[str, Any]) -> bool:
    """Whether a released config.json describes Parrot's experts, even if the stage that wrote it bypassed them."""
    fields = Fields(hf, CONFIG)
    return _moe_keys(_family(fields, fields.below(OWN_KEY)))[0] in fields


def _moe_keys(family: DecoderFamily) -> tuple[str, str]:
    """Number and inner width of Parrot's experts in config.json; a token-routed decoder's own have the plain names."""
    prefix = "mm_" if family.token_routed else ""
    return f"{prefix}num_experts", f"{prefix}moe_intermediate_size"


def _moe_from_hf(fields: Fields, llm: LLMConfig) -> TextGuidedMoEConfig:
    # Absent keys have the defaults of the released ParrotConfig; only a plain language model has no experts at all.
    count, inner = _moe_keys(llm.traits)
    if not fields.get("use_moe", bool, "moe_hidden_size" in fields or count in fields):
        return TextGuidedMoEConfig(num_experts=0)
    if fields.get("moe_hidden_size", int, llm.hidden_size) != llm.hidden_size:
        raise fields.wrong("moe_hidden_size", f"{llm.hidden_size} (hidden_size)")
    return TextGuidedMoEConfig(
        num_experts=fields.require(count, int),
        ffn_hidden_size=fields.require(inner, int),
        routing="dense",
        residual="code" if fields.get("use_moe_residual", bool, True) else "none",
        residual_weight=fields.get("moe_weight", float, 1.0),
    )


def _hf_fields(config: ParrotConfig) -> dict[str, Any]:
    llm, moe = config.llm, config.moe
    model_type = f"parrot_{llm.family}" if config.flamingo is None else MULTIMODAL_GPT
    fields: dict[str, Any] = {
        "architectures": [PARROT_TYPES.get(model_type, "MultimodalGPT")],
        "model_type": model_type,
        **llm_fields(llm),
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
    if moe.num_experts:
        count, inner = _moe_keys(llm.traits)
        fields |= {
            count: moe.num_experts,
            "moe_hidden_size": llm.hidden_size,
            inner: moe.ffn_hidden_size,
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
    with naming_file(fields.file):
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
    with naming_file(file):
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
