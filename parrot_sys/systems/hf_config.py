"""config.json of the released layouts (`model_type: parrot_qwen2`, `wings_llama`, ...) <-> ParrotConfig.

Field names follow the public code (AIDC-AI/Parrot, parrot/model). Settings that the released layout cannot express
(routing `topk`, residual `paper`, ...) are kept leaf by leaf under the key `parrot_sys`, so that import after export
gives the same configuration and a released file stays as it was.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from parrot_sys.config_values import build, config_to_dict, merge, section_class
from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, naming_file, read_json
from parrot_sys.models.llm import llm_config_from_hf
from parrot_sys.systems.base import System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import RELEASED_TYPES, system_of
from parrot_sys.towers import KNOWN_TOWERS, VisionConfig, vision_config_from_hf

_UNNAMED = "parrot_qwen2"
"""model_type of a config.json without one."""
OWN_KEY = "parrot_sys"
CONFIG = "config.json"
EXPORTED_TOWER = "vision_tower"
"""Folder inside an exported checkpoint with the tower's config.json and preprocessor_config.json."""

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

    Raises:
        ConfigError: a field is missing, or asks for something that Parrot does not do.
        CheckpointError: the vision tower's shape is nowhere to be found.
    """
    fields = Fields(hf, directory / CONFIG)
    model_type = fields.get("model_type", str, _UNNAMED)
    if model_type not in RELEASED_TYPES:
        raise fields.wrong("model_type", f"one of {', '.join(RELEASED_TYPES)}")
    system = RELEASED_TYPES[model_type]
    fields.require_value("mm_patch_merge_type", "flat", "pictures are not cut into tiles here")
    fields.require_value("tokenizer_padding_side", "right", "logits of a batch are padded on the right here")
    own = fields.below(OWN_KEY)
    llm = llm_config_from_hf(system.decoder_fields(fields), family=system.family(model_type, fields, own))
    settings = system.from_hf(fields, llm, _vision(fields, directory, own.below("vision"), system), directory)
    if not settings["max_seq_len"]:
        settings.pop("max_seq_len")
    with naming_file(fields.file):
        config = ParrotConfig(llm=llm, **settings)
    changes = {name: value for name, value in fields.get(OWN_KEY, dict, {}).items() if name != "vision"}
    return cast(ParrotConfig, _apply(config, changes, fields.file, own.prefix))


def config_to_hf(
    config: ParrotConfig, original: Mapping[str, Any] | None, directory: Path, *, bypass: Collection[str] = ()
) -> dict[str, Any]:
    """config.json for `config`, to be written into `directory` (whose tower folder, if any, is already there).

    `original`, the config.json the model came from, keeps its order and every field that ParrotConfig does not know.
    `bypass`: parts that the model passes by.
    """
    system = system_of(config)
    if original is not None and _describes(original, config, directory):
        return {**original, **system.bypass_fields(config, bypass)}
    model_type = system.model_type(config)
    hf = dict(system.new_fields() if original is None else original)
    hf.pop(OWN_KEY, None)
    fields = {
        "architectures": [system.model_types[model_type]],
        "model_type": model_type,
        **system.decoder_to_hf(config.llm),
        **system.to_hf(config),
    }
    for name, value in fields.items():
        if isinstance(value, dict) and isinstance(hf.get(name), dict):
            value = {**hf[name], **value}
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
    hf |= system.bypass_fields(config, bypass)
    return {**hf, OWN_KEY: own} if own else hf


def _describes(hf: Mapping[str, Any], config: ParrotConfig, directory: Path) -> bool:
    """Whether a config.json says all there is to say about a model."""
    if hf.get("model_type", _UNNAMED) not in RELEASED_TYPES:
        return False  # of the decoder that the model was put together from
    try:
        return not _difference(config_from_hf(hf, directory), config)
    except CheckpointError:  # the tower's shape is nowhere to be found
        return False


def _vision(fields: Fields, directory: Path, own: Fields, system: System) -> VisionConfig:
    select_layer = fields.get("mm_vision_select_layer", int, VisionConfig().select_layer)
    select_feature = fields.get("mm_vision_select_feature", str, system.select_feature)
    name = fields.get("mm_vision_tower", str, "")
    tower = find_tower_directory(fields.values, directory)
    if tower is not None:
        base = vision_config_from_hf(read_json(tower / CONFIG), path=str(tower), file=tower / CONFIG)
    elif (known := KNOWN_TOWERS.get(Path(name).name)) is not None:
        base = known
    elif "vision_config" in fields:
        base = vision_config_from_hf(fields.values, file=fields.file)
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
