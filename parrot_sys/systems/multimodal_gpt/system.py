"""MultiModal-GPT among the systems, in the one directory that `parrot convert` makes of its released files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from parrot_sys.files import Fields
from parrot_sys.models.llm import FAMILIES, DecoderFamily, LLMConfig, llm_maps
from parrot_sys.models.lora_maps import llm_lora_maps
from parrot_sys.models.tensor_map import TensorMap
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.base import Part, System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.multimodal_gpt.costs import MultimodalGptCosts
from parrot_sys.systems.multimodal_gpt.maps import as_in_multimodal_gpt, flamingo_maps
from parrot_sys.towers import VisionConfig


class MultimodalGpt(System):
    """Text reads latents of the images by gated cross-attention; no image has rows among the text."""

    name = "multimodal_gpt"
    title = "MultiModal-GPT"
    section = "flamingo"
    example = ("multimodal_gpt_9b", "multimodal_gpt_instruct")
    own_parts: ClassVar[Mapping[str, Part]] = {
        "resampler": Part(description="the resampler", marks=("resampler.",)),
        "cross_attention": Part(description="the gated blocks", marks=(".gated_cross_attention.",)),
    }
    template = "instruction"

    def bridge(self) -> type[Any]:
        """Class of its bridge."""
        from parrot_sys.systems.multimodal_gpt.bridge import MultimodalGptBridge

        return MultimodalGptBridge

    @property
    def model_types(self) -> Mapping[str, str]:
        """One: LLaMA's config.json with our own part, where `llm.family` names another decoder."""
        return {"multimodal_gpt": "MultimodalGPT"}

    def family(self, model_type: str, fields: Fields, own: Fields) -> DecoderFamily:
        """Family of the decoder, which our own part of config.json names."""
        # Written before there were families: only these two, told apart by the biases.
        before = "qwen2" if fields.get("attention_bias", bool, False) else "llama"
        llm = own.below("llm")
        name = llm.get("family", str, before)
        if name not in FAMILIES:
            raise llm.wrong("family", f"one of {', '.join(FAMILIES)}")
        return FAMILIES[name]

    def model_type(self, model: ParrotConfig) -> str:
        """The one type, whatever the decoder."""
        return self.name

    def from_hf(self, fields: Fields, llm: LLMConfig, vision: VisionConfig, directory: Path) -> dict[str, Any]:
        """Nothing of its own: resampler, gated blocks and updates are in our own part of config.json."""
        return {
            "vision": vision,
            "projector": ProjectorConfig(),
            "moe": TextGuidedMoEConfig(num_experts=0),
            "template": self.template,
            "max_seq_len": fields.get("tokenizer_model_max_length", int),
        }

    def to_hf(self, model: ParrotConfig) -> dict[str, Any]:
        """Fields beside LLaMA's."""
        return {
            "tokenizer_model_max_length": model.max_seq_len,
            "mm_vision_select_layer": model.vision.select_layer,
            "attention_bias": model.llm.qkv_bias,
        }

    def maps(self, model: ParrotConfig) -> list[TensorMap]:
        """Decoder, resampler, gated blocks and the updates of all of them."""
        assert model.flamingo is not None, "the registry chose this system"
        llm = model.llm
        decoder = llm_maps(llm, "decoder.") + llm_lora_maps(llm, model.lora, "decoder.")
        media = flamingo_maps(model.flamingo, llm.hidden_size, model.vision.hidden_size, llm.num_layers, model.lora)
        return as_in_multimodal_gpt(decoder) + media

    def costs(self) -> MultimodalGptCosts:
        """Costs of its parts."""
        return MultimodalGptCosts()
