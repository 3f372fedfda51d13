"""Weights of released checkpoints -> this rank's part of a model."""

from __future__ import annotations

import logging
from pathlib import Path

from parrot_sys.files import read_json
from parrot_sys.megatron.experts import expert_groups
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.state_dict import fill, fill_experts, load_tower, model_tensors, refuse
from parrot_sys.models.finite import NonFinite
from parrot_sys.models.llm import llm_maps
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import TensorMap, check_tensors
from parrot_sys.systems.build import config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import CONFIG, find_tower_directory
from parrot_sys.systems.maps import holds_tower, is_carried, parrot_maps
from parrot_sys.systems.registry import RELEASED_TYPES, system_of

logger = logging.getLogger(__name__)


def load_released(model: MultimodalModel, directory: str | Path, *, allow_non_finite: bool = False) -> None:
    """Fill this rank's part of the model from a checkpoint in the released layout, or start it from a bare decoder.

    A bare language model fills the decoder only: all other parts keep their initial values. The vision tower comes
    from inside the checkpoint, from the directory beside it that config.json names, or as `load_tower` finds it.
    Every rank calls this.

    Args:
        model: to be filled.
        directory: the checkpoint.
        allow_non_finite: NaN and infinite weights are a warning, not an error.

    Raises:
        CheckpointError: lists every missing, unexpected and mis-shaped tensor by name, or those with weights that are
            no numbers.
    """
    directory, non_finite = Path(directory), NonFinite()
    hf, config = read_json(directory / CONFIG), config_of(model)
    tensors = model_tensors(model)
    rank, size = model.tp_group.rank(), model.tp_group.size()
    experts = expert_groups(model.pg_collection)
    released = hf.get("model_type") in RELEASED_TYPES
    with TensorFiles(directory, system_of(config).usual_name if released else None) as files:
        keys = files.names()
        inside = holds_tower(keys, config)
        maps = _wanted(config, released, list(keys), directory, with_vision_tower=inside)
        check_tensors(maps, {key: files.shape(key) for key in keys if not is_carried(key, config)}, str(directory))
        for entry in maps:
            if entry.experts:
                fill_experts(tensors, entry, files.tensor, experts, non_finite)
        shared = [entry for entry in maps if not entry.experts]
        fill(tensors, shared, files.tensor, rank=rank, size=size, non_finite=non_finite)
    if model.vision_tower is not None and not inside:
        tower = find_tower_directory(hf, directory)
        load_tower(model.vision_tower, config.vision, tower, rank=rank, size=size, non_finite=non_finite)
    refuse(non_finite, directory, allow=allow_non_finite)


def _wanted(
    config: ParrotConfig, released: bool, keys: list[str], directory: Path, *, with_vision_tower: bool
) -> list[TensorMap]:
    """Tensors that a checkpoint has to hold; parts that an earlier stage does not have keep their initial values."""
    if not released:
        logger.info("%s is a bare language model: all other parts keep their initial values", directory)
        return llm_maps(config.llm, "decoder.")
    maps, system = parrot_maps(config, with_vision_tower=with_vision_tower), system_of(config)
    for kind, is_missing in (("LoRA", is_lora), ("what later stages add", system.is_of_later_stage)):
        if any(is_missing(entry.keys[0]) for entry in maps) and not any(map(is_missing, keys)):
            logger.info("%s lacks %s: it keeps its initial values", directory, kind)
            maps = [entry for entry in maps if not is_missing(entry.keys[0])]
    return maps


def bypassed_parts(directory: str | Path, config: ParrotConfig) -> frozenset[str]:
    """Parts that a released checkpoint passes by, because an early stage of training wrote it."""
    with TensorFiles(Path(directory)) as files:
        return system_of(config).bypassed(files.names())
