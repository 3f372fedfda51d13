"""Wings among the systems, and its released layout (AIDC-AI/Wings): fields of config.json, names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from parrot_sys.errors import CheckpointError
from parrot_sys.files import Fields, naming_file
from parrot_sys.models.llm import FAMILIES, LLMConfig
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.models.tensor_map import TensorMap, copied
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.base import PROJECTOR, Part, System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.image_rows import NEW_FIELDS, image_fields, image_rows_maps, projector_from_hf
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.systems.wings.costs import WingsCosts
from parrot_sys.towers import VisionConfig

_LEARNERS = {"visual_learner": "attn_pool", "textual_learner": "attn_t_pool"}
_LEARNER_LAYER = re.compile(r"^model\.layers\.(\d+)\.attn_pool\.")
_TOWER_BLOCK = re.compile(r"\.vision_model\.encoder\.layers\.(\d+)\.")
_ROUTER = ".reweight_module."
"""In the released name of every router's tensor; checkpoints of the first stage have none."""


class Wings(System):
    """Image rows among the text, and learners beside each layer's attention that read images and words."""

    name = "wings"
    title = "Wings"
    section = "wings"
    example = ("wings_qwen1_5_7b", "wings_instruct")
    own_parts: ClassVar[Mapping[str, Part]] = {
        **PROJECTOR,
        "visual_learners": Part(description="the visual learners", marks=(".visual_learner.",)),
        "textual_learners": Part(
            description="textual learners and routers",
            marks=(".textual_learner.", ".learners.router."),
            may_be_bypassed=True,
            inner={"router": (".learners.router.",)},
        ),
    }
    select_feature = "patch"

    def bridge(self) -> type[Any]:
        """Class of its bridge."""
        from parrot_sys.systems.wings.bridge import WingsBridge

        return WingsBridge

    @property
    def model_types(self) -> Mapping[str, str]:
        """One for each family of decoders; the public code knows `wings_qwen2` and `wings_llama`."""
        return {f"wings_{family.name}": f"Wings{family.architecture}ForCausalLM" for family in FAMILIES.values()}

    def from_hf(self, fields: Fields, llm: LLMConfig, vision: VisionConfig, directory: Path) -> dict[str, Any]:
        """Settings of the learners; config.json does not say which layers have them, the tensors do."""
        names = _tensor_names(directory)
        default = WingsConfig()
        layers = sorted({int(found[1]) for name in names if (found := _LEARNER_LAYER.match(name))})
        with naming_file(fields.file):
            wings = WingsConfig(
                rank=fields.get("lora_dim", int, 8),  # absent: the public code's default, not its scripts'
                layers=None if len(layers) in (0, llm.num_layers) else tuple(layers),
                system_prompt_length=fields.get("system_prompt_length", int, default.system_prompt_length),
            )
        return {
            "vision": _tower_as_stored(vision, names),
            "projector": projector_from_hf(fields),
            "moe": TextGuidedMoEConfig(num_experts=0),
            "wings": wings,
            "max_seq_len": fields.get("tokenizer_max_length", int),
        }

    def to_hf(self, model: ParrotConfig) -> dict[str, Any]:
        """Fields of the released configuration."""
        assert model.wings is not None, "the registry chose this system"
        return image_fields(model) | {
            "tokenizer_max_length": model.max_seq_len,
            "lora_dim": model.wings.rank,
            "system_prompt_length": model.wings.system_prompt_length,
            "image_token_length": model.rows_per_image,
        }

    def new_fields(self) -> Mapping[str, Any]:
        """Fields that the released code reads besides."""
        return NEW_FIELDS

    def maps(self, model: ParrotConfig) -> list[TensorMap]:
        """Decoder, projector, learners and routers."""
        assert model.wings is not None, "the registry chose this system"
        return image_rows_maps(model) + learner_maps(model.wings, model.llm, "decoder.")

    def costs(self) -> WingsCosts:
        """Costs of its parts."""
        return WingsCosts()

    def bypassed(self, names: Iterable[str]) -> frozenset[str]:
        """Textual learners and routers, where a checkpoint of the first stage has no routers."""
        return frozenset() if any(_ROUTER in name for name in names) else frozenset({"textual_learners"})

    def is_of_later_stage(self, key: str) -> bool:
        """Routers: the first stage has none."""
        return _ROUTER in key


def _tensor_names(directory: Path) -> Collection[str]:
    """Released names in a checkpoint; none where its weights are yet to be written."""
    try:
        with TensorFiles(directory) as files:
            return files.names()
    except CheckpointError:
        return ()


def _tower_as_stored(vision: VisionConfig, names: Collection[str]) -> VisionConfig:
    """The tower inside a checkpoint: the public code drops SigLIP's last block before it saves."""
    blocks = {int(found[1]) for name in names if (found := _TOWER_BLOCK.search(name))}
    if vision.tower.has_cls or len(blocks) != vision.num_layers - 1:
        return vision
    return replace(vision, num_layers=len(blocks), select_layer=-1)


def learner_maps(wings: WingsConfig, llm: LLMConfig, prefix: str = "") -> list[TensorMap]:
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
        maps.append(copied(f"{ours}.router.weight", f"{key}{_ROUTER}linear.weight", 2, wings.router_positions))
        maps.append(copied(f"{ours}.router.bias", f"{key}{_ROUTER}linear.bias", 2))
    return maps
