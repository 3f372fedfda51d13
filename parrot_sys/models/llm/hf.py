"""The decoder's part of a Hugging Face config.json <-> LLMConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields, naming_file
from parrot_sys.models.llm.config import LLMConfig
from parrot_sys.models.llm.families import FAMILIES
from parrot_sys.models.llm.family import DecoderFamily
from parrot_sys.models.llm.token_experts import TokenExpertsConfig
from parrot_sys.modules.rotary import RopeScaling

_SCALING_FIELDS = {"factor": "factor", "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor"}
"""Our setting -> the one in `rope_scaling` of config.json."""


def family_of(fields: Fields) -> DecoderFamily:
    """Family of a bare language model, by its `model_type`; Qwen2 where config.json has none.

    Raises:
        ConfigError: there is none of that type.
    """
    model_type = fields.get("model_type", str, "qwen2")
    if model_type not in FAMILIES:
        raise fields.wrong("model_type", f"one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def llm_config_from_hf(
    hf: Mapping[str, Any] | Fields, file: object = "config.json", *, family: DecoderFamily | None = None
) -> LLMConfig:
    """Decoder configuration from config.json.

    Args:
        hf: of a bare language model, or of a model with such a decoder.
        file: its name in messages, where `hf` does not bring one.
        family: of the decoder; by default that of `model_type`.

    Raises:
        ConfigError: a field is missing or of a wrong type, or asks for something that the decoder here does not do.
    """
    fields = hf if isinstance(hf, Fields) else Fields(hf, file)
    family = family or family_of(fields)
    fields.require_value("hidden_act", "silu", "the decoder here does nothing else")
    for name in family.refused:
        fields.require_value(name, False, "the decoder here does nothing else")
    rope, scaling = fields.below("rope_parameters"), fields.below("rope_scaling")
    heads = fields.require("num_attention_heads", int)
    hidden_size = fields.require("hidden_size", int)
    head_dim = fields.get("head_dim", int)
    with naming_file(fields.file):
        return LLMConfig(
            family=family.name,
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
            max_position_embeddings=fields.get("max_position_embeddings", int, family.max_position_embeddings),
            tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
            qkv_bias=family.qkv_bias,
            experts=_experts(fields) if family.token_routed else None,
        )


def llm_fields(llm: LLMConfig) -> dict[str, Any]:
    """Fields of config.json that describe the decoder."""
    fields: dict[str, Any] = {
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
    }
    if llm.head_dim is not None:
        fields["head_dim"] = llm.head_dim
    if (experts := llm.experts) is not None:
        fields |= {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.topk,
            "moe_intermediate_size": experts.ffn_hidden_size,
            "norm_topk_prob": experts.renormalize,
            "decoder_sparse_step": experts.sparse_step,
            "mlp_only_layers": list(experts.dense_layers),
        }
    if (scaling := llm.rope_scaling) is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            **{theirs: getattr(scaling, ours) for ours, theirs in _SCALING_FIELDS.items()},
            "original_max_position_embeddings": scaling.original_positions,
        }
    return fields


def _experts(fields: Fields) -> TokenExpertsConfig:
    # transformers 5 saves the number under another name than Qwen published it.
    count = "num_experts" if "num_experts" in fields else "num_local_experts"
    return TokenExpertsConfig(
        num_experts=fields.require(count, int),
        topk=fields.require("num_experts_per_tok", int),
        ffn_hidden_size=fields.require("moe_intermediate_size", int),
        renormalize=fields.get("norm_topk_prob", bool, False),
        sparse_step=fields.get("decoder_sparse_step", int, 1),
        dense_layers=tuple(fields.items("mlp_only_layers", int) if "mlp_only_layers" in fields else ()),
    )


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
