"""LLaVA among the systems, and its released layouts: those of transformers' `llava` and `llava_next`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields, naming_file
from parrot_sys.models.llm import FAMILIES, DecoderFamily, LLMConfig, llm_fields, llm_maps
from parrot_sys.models.lora_maps import llm_lora_maps
from parrot_sys.models.tensor_map import TensorMap, copied
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.base import Part, System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.llava.config import LlavaConfig
from parrot_sys.systems.llava.costs import LlavaCosts
from parrot_sys.towers import RESOLUTIONS, Feature, VisionConfig, resolutions_from_hf, vision_fields

_DECODER, _PROJECTOR = "language_model.", "multi_modal_projector."
_HEAD = f"{_DECODER}lm_head.weight"
_RENAMED = (
    (re.compile(r"^model\.language_model\."), f"{_DECODER}model."),
    (re.compile(r"^lm_head\."), f"{_DECODER}lm_head."),
    (re.compile(rf"^model\.({_PROJECTOR}|image_newline$|vision_tower\.)"), r"\1"),
    (re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."),
)
"""Names that newer versions of transformers give -> those of the published checkpoints, one change after the other."""


class Llava(System):
    """Projected rows of images, whole or cut into tiles, among the text."""

    name = "llava"
    title = "LLaVA"
    section = "llava"
    example = ("llava_next_qwen3_8b", "llava_instruct")
    own_parts: ClassVar[Mapping[str, Part]] = {
        "projector": Part(description="the projector and the newline row", marks=("projector.", "newline.")),
    }
    select_feature = "patch"
    tower_key = "vision_tower.vision_model."

    def bridge(self) -> type[Any]:
        """Class of its bridge."""
        from parrot_sys.systems.llava.bridge import LlavaBridge

        return LlavaBridge

    @property
    def model_types(self) -> Mapping[str, str]:
        """LLaVA-1.5 and LLaVA-NeXT; `text_config` names the decoder."""
        return {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}

    def model_type(self, model: ParrotConfig) -> str:
        """`llava_next` with tiles."""
        return "llava" if model.tiling is None else "llava_next"

    def family(self, model_type: str, fields: Fields, own: Fields) -> DecoderFamily:
        """Family that `text_config` names; LLaMA where it names none."""
        fields.require("text_config", dict)
        text = fields.below("text_config")
        name = text.get("model_type", str, "llama")
        if name not in FAMILIES:
            raise text.wrong("model_type", f"one of {', '.join(FAMILIES)}")
        return FAMILIES[name]

    def decoder_fields(self, fields: Fields) -> Fields:
        """`text_config` with what transformers takes for fields that it leaves out."""
        from transformers import AutoConfig

        text = fields.below("text_config")
        given = {name: value for name, value in text.values.items() if name != "model_type"}
        full = AutoConfig.for_model(text.get("model_type", str, "llama"), **given).to_dict()
        tied = fields.get("tie_word_embeddings", bool, False) or text.get("tie_word_embeddings", bool, False)
        return Fields({**full, **text.values, "tie_word_embeddings": tied}, fields.file, text.prefix)

    def from_hf(self, fields: Fields, llm: LLMConfig, vision: VisionConfig, directory: Path) -> dict[str, Any]:
        """Everything but the longest sample, which is what the decoder has positions for."""
        fields.require_value("projector_hidden_act", "gelu", "the projector here does nothing else")
        fields.require_value("multimodal_projector_bias", True, "the projector here has biases")
        with naming_file(fields.file):
            vision = replace(
                vision,
                select_layer=fields.get("vision_feature_layer", int, -2),
                select_feature=_select_feature(fields, vision),
            )
            llava = LlavaConfig(
                grids=_grids(fields, vision.image_size) if fields.require("model_type", str) == "llava_next" else (),
                image_token_id=_image_token(fields, llm.vocab_size),
            )
        return {
            "vision": vision,
            "projector": ProjectorConfig(type="mlp2x_gelu"),
            "moe": TextGuidedMoEConfig(num_experts=0),
            "llava": llava,
            "max_seq_len": llm.max_position_embeddings,
        }

    def to_hf(self, model: ParrotConfig) -> dict[str, Any]:
        """Fields of LlavaConfig and LlavaNextConfig."""
        llava, vision = model.llava, model.vision
        assert llava is not None, "the registry chose this system"
        fields: dict[str, Any] = {
            "vision_feature_layer": vision.select_layer,
            "vision_feature_select_strategy": _strategy(vision),
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": model.llm.tie_word_embeddings,
        }
        if tower := vision_fields(vision):
            fields["vision_config"] = tower
        if llava.image_token_id is not None:
            fields["image_token_index"] = llava.image_token_id
        if (tiling := model.tiling) is None:
            fields["image_seq_length"] = vision.num_visual_rows
        else:
            fields[RESOLUTIONS] = [list(resolution) for resolution in tiling.resolutions]
        return fields

    def decoder_to_hf(self, llm: LLMConfig) -> dict[str, Any]:
        """The decoder's fields, which are those of `text_config`; transformers has a width of heads of its own."""
        return {"text_config": {"model_type": llm.family, **llm_fields(llm), "head_dim": llm.kv_channels}}

    def maps(self, model: ParrotConfig) -> list[TensorMap]:
        """Decoder, projector and newline row."""
        hidden = model.llm.hidden_size
        decoder = llm_maps(model.llm, "decoder.") + llm_lora_maps(model.llm, model.lora, "decoder.")
        maps = [replace(entry, keys=tuple(_DECODER + key for key in entry.keys)) for entry in decoder]
        for number, (layer, columns) in enumerate(((0, model.vision.hidden_size), (2, hidden)), 1):
            ours, key = f"projector.{layer}", f"{_PROJECTOR}linear_{number}"
            maps += [
                copied(f"{ours}.weight", f"{key}.weight", hidden, columns),
                copied(f"{ours}.bias", f"{key}.bias", hidden),
            ]
        if model.tiling is not None:
            maps.append(copied("newline.row", "image_newline", hidden))
        return maps

    def costs(self) -> LlavaCosts:
        """Costs of its parts."""
        return LlavaCosts()

    def usual_name(self, key: str) -> str:
        """Name in the published checkpoints, from one of newer versions of transformers too."""
        for pattern, name in _RENAMED:
            key = pattern.sub(name, key)
        return key

    def is_carried(self, key: str, model: ParrotConfig) -> bool:
        """The head copy of tied embeddings."""
        return model.llm.tie_word_embeddings and key == _HEAD


def _select_feature(fields: Fields, vision: VisionConfig) -> Feature:
    """Rows of the tower: `default` leaves the first one out, `full` takes all."""
    strategy = fields.get("vision_feature_select_strategy", str, "default")
    if strategy not in ("default", "full"):
        raise fields.wrong("vision_feature_select_strategy", "'default' or 'full'")
    if strategy == "default" and not vision.tower.has_cls:
        raise ConfigError(
            f"{fields.file}: vision_feature_select_strategy must be 'full' with a tower without CLS row "
            f"({vision.type}), got 'default', which leaves out a patch"
        )
    return "cls_patch" if strategy == "full" and vision.tower.has_cls else "patch"


def _strategy(vision: VisionConfig) -> str:
    """The reverse of `_select_feature`."""
    return "default" if vision.tower.has_cls and vision.select_feature == "patch" else "full"


def _grids(fields: Fields, tile: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tiles of the resolutions that config.json names; transformers' own where it names none."""
    if RESOLUTIONS not in fields:
        return LlavaConfig().grids
    resolutions = resolutions_from_hf(fields)
    if any(side % tile for resolution in resolutions for side in resolution):
        raise fields.wrong(RESOLUTIONS, f"pairs of multiples of the tower's image_size {tile}")
    return tuple((height // tile, width // tile) for height, width in resolutions)


def _image_token(fields: Fields, vocab_size: int) -> int | None:
    """Token that stands for a picture; None where it is one of those that only transformers' processor knows."""
    token = fields.get("image_token_index", int)
    token = fields.get("image_token_id", int) if token is None else token
    return token if token is not None and token < vocab_size else None
