"""Parrot among the systems, and its released layout (AIDC-AI/Parrot, parrot/model)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from parrot_sys.files import Fields
from parrot_sys.models.llm import FAMILIES, DecoderFamily, LLMConfig
from parrot_sys.models.tensor_map import Shape, TensorMap
from parrot_sys.modules.released_experts import is_expert_bias, pack_released, released_keys, unpack_released
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.base import PROJECTOR, Part, System
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.image_rows import NEW_FIELDS, image_fields, image_rows_maps, projector_from_hf
from parrot_sys.systems.parrot.costs import ParrotCosts
from parrot_sys.towers import VisionConfig

_MOE = "model.moe_model."


class Parrot(System):
    """Projected image rows among the text, turned by experts that the prompt chooses."""

    name = "parrot"
    title = "Parrot"
    section = None
    example = ("parrot_7b", "lora_instruct")
    own_parts: ClassVar[Mapping[str, Part]] = {
        **PROJECTOR,
        "moe": Part(
            description="router and experts",
            marks=("moe.",),
            setting="model.moe.num_experts",
            may_be_bypassed=True,
            inner={"router": ("moe.router_weight",)},
        ),
    }

    def bridge(self) -> type[Any]:
        """Class of its bridge."""
        from parrot_sys.systems.parrot.bridge import ParrotBridge

        return ParrotBridge

    @property
    def model_types(self) -> Mapping[str, str]:
        """One for each family of decoders; the public code knows `parrot_qwen2` alone."""
        return {f"parrot_{family.name}": f"Parrot{family.architecture}ForCausalLM" for family in FAMILIES.values()}

    def from_hf(self, fields: Fields, llm: LLMConfig, vision: VisionConfig, directory: Path) -> dict[str, Any]:
        """Routing is dense whatever `moe_top_k` says: the released code stores that number and never uses it."""
        return {
            "vision": vision,
            "projector": projector_from_hf(fields),
            "moe": _moe_from_hf(fields, llm),
            "max_seq_len": fields.get("tokenizer_model_max_length", int),
        }

    def to_hf(self, model: ParrotConfig) -> dict[str, Any]:
        """Fields of the released ParrotConfig."""
        moe, fields = model.moe, image_fields(model)
        fields |= {"tokenizer_model_max_length": model.max_seq_len, "use_moe": moe.num_experts > 0}
        if moe.num_experts:
            count, inner = _moe_keys(model.llm.traits)
            fields |= {
                count: moe.num_experts,
                "moe_hidden_size": model.llm.hidden_size,
                inner: moe.ffn_hidden_size,
                "use_moe_residual": moe.residual == "code",
                "moe_weight": moe.residual_weight,
            }
            if moe.routing == "topk":
                fields["moe_top_k"] = moe.topk
        return fields

    def bypass_fields(self, model: ParrotConfig, bypass: Collection[str]) -> dict[str, Any]:
        """`use_moe`: whether the experts that the file describes take part."""
        return {"use_moe": "moe" not in bypass} if model.moe.num_experts else {}

    def with_bypassed_parts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The file with its experts, even if the stage that wrote it passed them by."""
        fields = Fields(hf, "config.json")
        family = self.family(fields.require("model_type", str), fields, fields)
        return {**hf, "use_moe": True} if _moe_keys(family)[0] in fields else dict(hf)

    def unsure_sections(self, hf: Mapping[str, Any]) -> tuple[str, ...]:
        """The experts' section of a file that does not use them."""
        return ("moe",) if hf.get("use_moe") is False and self.with_bypassed_parts(hf) == hf else ()

    def new_fields(self) -> Mapping[str, Any]:
        """Fields that the released code reads besides."""
        return NEW_FIELDS

    def maps(self, model: ParrotConfig) -> list[TensorMap]:
        """Decoder, projector and experts."""
        return image_rows_maps(model) + (moe_maps(model) if model.moe.num_experts else [])

    def costs(self) -> ParrotCosts:
        """Costs of its parts."""
        return ParrotCosts()

    def is_of_later_stage(self, key: str) -> bool:
        """Bias of the experts: a stage may bring it in, at zero."""
        return is_expert_bias(key)

    def is_carried(self, key: str, model: ParrotConfig) -> bool:
        """Experts of a checkpoint that bypasses them (`use_moe: false`)."""
        return model.moe.num_experts == 0 and key.startswith(_MOE)


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


def moe_maps(model: ParrotConfig, prefix: str = "moe.") -> list[TensorMap]:
    """TextGuidedMoE's fused parameters <-> `model.moe_model.*`."""
    hidden, inner = model.llm.hidden_size, model.moe.ffn_hidden_size
    shapes = {"gate.weight": (model.moe.num_experts, hidden), "down_proj.weight": (hidden, inner)}

    def shape(key: str) -> Shape:
        if is_expert_bias(key):
            return (model.moe.num_experts,)
        return shapes.get(key.removeprefix(f"experts.{key.split('.')[1]}."), (inner, hidden))

    return [
        TensorMap(
            name=prefix + name,
            keys=tuple(f"{_MOE}{key}" for key in keys),
            shapes=tuple(shape(key) for key in keys),
            pack=partial(pack_released, name),
            unpack=partial(unpack_released, name),
            experts=name.startswith("w_"),
        )
        for name, keys in released_keys(model.moe.num_experts, expert_bias=model.moe.expert_bias).items()
    ]
