"""The released layout of Wings (AIDC-AI/Wings): its fields of config.json and the names of its own tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields
from parrot_sys.models.llm import FAMILIES, LLMConfig
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import TensorMap, copied
from parrot_sys.modules.wings import WingsConfig
from parrot_sys.towers import VisionConfig

WINGS_TYPES = {f"wings_{family.name}": f"Wings{family.architecture}ForCausalLM" for family in FAMILIES.values()}
"""model_type of a Wings checkpoint -> its architecture; the public code knows `wings_qwen2` and `wings_llama`."""

_LEARNERS = {"visual_learner": "attn_pool", "textual_learner": "attn_t_pool"}
_LEARNER_LAYER = re.compile(r"^model\.layers\.(\d+)\.attn_pool\.")
_TOWER_BLOCK = re.compile(r"\.vision_model\.encoder\.layers\.(\d+)\.")
ROUTER = ".reweight_module."
"""In the released name of every router's tensor; checkpoints of the first stage have none."""


def tensor_names(directory: Path) -> Collection[str]:
    """Released names in a checkpoint; none where its weights are yet to be written."""
    try:
        with TensorFiles(directory) as files:
            return files.names()
    except CheckpointError:
        return ()


def wings_from_hf(hf: Fields, names: Collection[str], num_layers: int) -> WingsConfig:
    """Settings of the learners: config.json does not say which layers have them, the tensors do."""
    default = WingsConfig()
    layers = sorted({int(found[1]) for name in names if (found := _LEARNER_LAYER.match(name))})
    return WingsConfig(
        rank=hf.get("lora_dim", int, 8),  # absent: the public code's default, not its scripts'
        layers=None if len(layers) in (0, num_layers) else tuple(layers),
        system_prompt_length=hf.get("system_prompt_length", int, default.system_prompt_length),
    )


def tower_as_stored(vision: VisionConfig, names: Collection[str]) -> VisionConfig:
    """The tower inside a checkpoint: the public code drops SigLIP's last block before it saves."""
    blocks = {int(found[1]) for name in names if (found := _TOWER_BLOCK.search(name))}
    if vision.tower.has_cls or len(blocks) != vision.num_layers - 1:
        return vision
    return replace(vision, num_layers=len(blocks), select_layer=-1)


def wings_fields(wings: WingsConfig, llm: LLMConfig, num_visual_rows: int, max_seq_len: int) -> dict[str, Any]:
    """Fields of a Wings checkpoint's config.json besides those that all systems have."""
    model_type = f"wings_{llm.family}"
    return {
        "architectures": [WINGS_TYPES[model_type]],
        "model_type": model_type,
        "tokenizer_max_length": max_seq_len,
        "lora_dim": wings.rank,
        "system_prompt_length": wings.system_prompt_length,
        "image_token_length": num_visual_rows,
    }


def wings_maps(wings: WingsConfig, llm: LLMConfig, prefix: str = "") -> list[TensorMap]:
    """Learners and routers of a decoder (names after `prefix`) <-> `attn_pool`, `attn_t_pool`, `reweight_module`."""
    hidden, rank = llm.hidden_size, wings.rank
    maps = []
    for layer in filter(wings.has_learners, range(llm.num_layers)):
        ours, key = f"{prefix}decoder.layers.{layer}.learners", f"model.layers.{layer}"
        for learner, released in _LEARNERS.items():
            for part in "qkvo":
                name, released_name = f"{ours}.{learner}.{part}", f"{key}.{released}.{part}_proj"
                maps.append(copied(f"{name}_down", f"{released_name}.0.weight", rank, hidden))
                maps.append(copied(f"{name}_up", f"{released_name}.1.weight", hidden, rank))
        maps.append(copied(f"{ours}.router.weight", f"{key}{ROUTER}linear.weight", 2, wings.router_positions))
        maps.append(copied(f"{ours}.router.bias", f"{key}{ROUTER}linear.bias", 2))
    return maps
