"""Constants that weights bring with them: the files beside the weights against the settings of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.config_values import config_to_dict, leaves, load_config
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.files import read_json
from parrot_sys.models.llm import llm_config_from_hf
from parrot_sys.systems.config import SECTIONS, ParrotConfig
from parrot_sys.systems.hf_config import CONFIG, OWN_KEY, config_from_hf
from parrot_sys.systems.registry import RELEASED_TYPES
from parrot_sys.towers import vision_config_from_hf

MODEL_CONFIG = "model_config.yaml"
"""Settings of the model in a training checkpoint."""
_SECTIONS = ("llm", "vision", "projector", "moe", *SECTIONS)
_CHOICES = frozenset(
    {
        "vision.path",  # where files lie
        "moe.recompute",  # memory against time
        "moe.fp8",  # digits against time
        "moe.aux_loss_coeff",  # how the router is trained
        "moe.z_loss_coeff",
        "moe.information_coeff",
        "moe.evenness_coeff",
        "moe.entropy_coeff",
        "moe.router_scale_start",
        "moe.router_scale_steps",
        "moe.bias_update_rate",
        "wings.rule",  # the public code's rules or the paper's, with the same weights
        "flamingo.media_rule",
    }
)
"""Settings in these sections that a run chooses, whatever weights it starts from."""
_NOT_OF_A_TOWER = frozenset({"select_layer", "select_feature", "path"})
"""Settings of a tower that its own config.json does not know."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting of the model that contradicts the weights."""

    field: str  # dotted, `model.llm.rope_base`
    wanted: Any  # what the settings say
    found: Any  # what the checkpoint says
    file: str  # where it says so


def check_constants(model: ParrotConfig, directory: str | Path, *, allowed: Collection[str] = ()) -> None:
    """Compares the decoder, tower, projector and system sections of `model` with the weights that it starts from.

    Args:
        model: settings of the run.
        directory: a model in the released layout, a training checkpoint, or a bare language model, which is compared
            with the decoder alone.
        allowed: fields that may differ (`model.moe.routing`).

    Raises:
        ConfigError: lists every field that differs, with what was wanted and what was found; or `allowed` names a field
            that is not compared.
        CheckpointError: a file is missing or broken.
    """
    known = {f"model.{name}" for name in comparable(model)}
    if unknown := sorted(set(allowed) - known):
        raise ConfigError(
            f"checkpoint.allow-differences must name fields of {', '.join(f'model.{name}' for name in _SECTIONS)} that "
            f"are compared with the checkpoint, got {', '.join(unknown)}"
        )
    differences = [found for found in find_differences(model, Path(directory)) if found.field not in allowed]
    if differences:
        lines = "".join(f"\n  {d.field}: wanted {d.wanted}, found {d.found} in {d.file}" for d in differences)
        fields = " ".join(d.field for d in differences)
        raise ConfigError(
            f"the settings contradict the weights of {directory} in {len(differences)} constants:{lines}\n"
            f"fix: set them as found (or choose the preset of this model); to train on with the settings as they are, "
            f"--checkpoint.allow-differences {fields}"
        )


def find_differences(model: ParrotConfig, directory: Path) -> list[Difference]:
    """Every field in which `model` contradicts the checkpoint in `directory`, in the order of the sections."""
    saved = directory / MODEL_CONFIG
    if saved.is_file():
        return _compare(model, comparable(load_config(ParrotConfig, saved)), saved)
    file = directory / CONFIG
    hf = read_json(file)
    if hf.get("model_type") not in RELEASED_TYPES:
        decoder = leaves({"llm": config_to_dict(llm_config_from_hf(hf, file))})
        return _compare(model, dict(decoder), file) + _compare_tower(model)
    system = RELEASED_TYPES[hf["model_type"]]
    # A stage that passes parts by keeps them; loading finds out whether it did.
    unsure = system.unsure_sections(hf)
    hf = system.with_bypassed_parts(hf)
    try:
        found = comparable(config_from_hf(hf, directory))
    except CheckpointError:  # the tower's shape is not in the checkpoint
        own = {**hf.get(OWN_KEY, {}), "vision": {"type": model.vision.type}}
        found = comparable(config_from_hf({**hf, OWN_KEY: own}, directory))
        found = {name: value for name, value in found.items() if not name.startswith("vision.")}
    found = {name: value for name, value in found.items() if name.split(".")[0] not in unsure}
    return _compare(model, found, file) + _compare_tower(model)


def _compare_tower(model: ParrotConfig) -> list[Difference]:
    """Against the config.json of a tower that lies in a directory of its own."""
    if model.vision.path is None or not (file := Path(model.vision.path) / CONFIG).is_file():
        return []
    tower = config_to_dict(vision_config_from_hf(read_json(file), file=file))
    return _compare(model, {f"vision.{k}": v for k, v in tower.items() if k not in _NOT_OF_A_TOWER}, file)


def _compare(model: ParrotConfig, found: Mapping[str, Any], file: Path) -> list[Difference]:
    """Fields of `found` that `model` has otherwise; a section that only one of them has differs as a whole."""
    wanted = comparable(model)
    whole = {name for name in _SECTIONS if name in wanted or name in found}  # unset on one side at least
    compared = {name.split(".")[0] for name in found}
    differences: dict[str, Difference] = {}
    for name in (*wanted, *found):
        section = name.split(".")[0]
        # What dense routing does not read, and what the config.json of a tower does not know.
        only_here = section in ("moe", "vision") and (name in wanted) != (name in found)
        if section not in compared or only_here or wanted.get(name) == found.get(name):
            continue
        if section in whole:
            name = section
            ours, theirs = ("unset" if section in side else "set" for side in (wanted, found))
        else:
            ours, theirs = ("unset" if side.get(name) is None else side[name] for side in (wanted, found))
        differences[name] = Difference(f"model.{name}", ours, theirs, str(file))
    return list(differences.values())


def comparable(model: ParrotConfig) -> dict[str, Any]:
    """Dotted field -> value of everything that is compared; a section that is not there is one field, None."""
    values = config_to_dict(model)
    unread = set(_CHOICES)
    if model.moe.num_experts == 0:
        unread |= {f"moe.{name}" for name in values["moe"] if name != "num_experts"}
    elif model.moe.routing == "dense":
        unread |= {"moe.topk", "moe.renormalize", "moe.expert_bias"}
    return {name: value for name, value in leaves({name: values[name] for name in _SECTIONS}) if name not in unread}
