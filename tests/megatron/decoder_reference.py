"""Transformers' own models as the independent references of our decoder; the copy of their weights into ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from parrot_sys.models.llm import LLMConfig, TokenExpertsConfig
from parrot_sys.modules.rotary import RopeScaling

TINY = LLMConfig(
    family="qwen2",
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=56,
    vocab_size=96,
    rope_base=10_000.0,
    max_position_embeddings=128,
)
QWEN3 = dataclasses.replace(TINY, family="qwen3", qkv_bias=False, head_dim=12)
"""Heads of 12 columns, which do not fill the 32 of the rows."""
QWEN3_MOE = dataclasses.replace(
    QWEN3, family="qwen3_moe", num_layers=3, experts=TokenExpertsConfig(num_experts=8, topk=3, ffn_hidden_size=20)
)
QWEN3_MOE_MIXED = dataclasses.replace(
    QWEN3_MOE,
    num_layers=5,
    experts=TokenExpertsConfig(
        num_experts=4, topk=2, ffn_hidden_size=20, renormalize=False, sparse_step=2, dense_layers=(1,)
    ),
)
"""Experts in the fourth layer alone, whose weights do not add up to 1."""
LLAMA = dataclasses.replace(
    TINY,
    family="llama",
    qkv_bias=False,
    rope_scaling=RopeScaling(factor=4.0, low_frequency=1.0, high_frequency=4.0, original_positions=32),
)
"""Wave lengths from 6 to 2000 positions: some are kept, some stretched, some in between."""

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def build_reference(llm: LLMConfig, seed: int = 0) -> PreTrainedModel:
    """The family's model of transformers, randomly initialised, with biases and norm weights that are not 0 and 1."""
    torch.manual_seed(seed)
    config, model_class = _CLASSES[llm.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": llm.rope_base}
    if (scaling := llm.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_positions,
        }
    experts: dict[str, Any] = {}
    if llm.experts is not None:
        experts = {
            "num_experts": llm.experts.num_experts,
            "num_experts_per_tok": llm.experts.topk,
            "moe_intermediate_size": llm.experts.ffn_hidden_size,
            "norm_topk_prob": llm.experts.renormalize,
            "decoder_sparse_step": llm.experts.sparse_step,
            "mlp_only_layers": list(llm.experts.dense_layers),
        }
    model = model_class(
        config(
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_attention_heads,
            num_key_value_heads=llm.num_query_groups,
            head_dim=llm.kv_channels,
            intermediate_size=llm.ffn_hidden_size,
            vocab_size=llm.vocab_size,
            rope_parameters=rope,
            rms_norm_eps=llm.norm_eps,
            max_position_embeddings=llm.max_position_embeddings,
            tie_word_embeddings=llm.tie_word_embeddings,
            attn_implementation="eager",
            **experts,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def _fuse_qkv(llm: LLMConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rows of the three projections -> rows by key/value group: its queries, its key, its value."""
    groups, width = llm.num_query_groups, llm.kv_channels
    parts = [query.unflatten(0, (groups, -1)), key.unflatten(0, (groups, width)), value.unflatten(0, (groups, width))]
    return torch.cat(parts, dim=1).flatten(0, 1)


def megatron_tensors(llm: LLMConfig, source: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name in our decoder, tensor) for the tensors of its state dict (weights or their gradients)."""
    yield "embedding.word_embeddings.weight", source["model.embed_tokens.weight"]
    yield "decoder.final_layernorm.weight", source["model.norm.weight"]
    if not llm.tie_word_embeddings:
        yield "output_layer.weight", source["lm_head.weight"]
    for i in range(llm.num_layers):
        theirs, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        for kind in ("weight", "bias") if llm.qkv_bias else ("weight",):
            qkv = [source[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            yield f"{ours}.self_attention.linear_qkv.{kind}", _fuse_qkv(llm, *qkv)
        for part in "qk" if llm.qk_norm else "":
            yield f"{ours}.self_attention.{part}_layernorm.weight", source[f"{theirs}.self_attn.{part}_norm.weight"]
        yield f"{ours}.self_attention.linear_proj.weight", source[f"{theirs}.self_attn.o_proj.weight"]
        yield f"{ours}.input_layernorm.weight", source[f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.pre_mlp_layernorm.weight", source[f"{theirs}.post_attention_layernorm.weight"]
        if llm.has_experts(i):
            yield f"{ours}.mlp.router.weight", source[f"{theirs}.mlp.gate.weight"]
            yield f"{ours}.mlp.experts.w_gate_up", source[f"{theirs}.mlp.experts.gate_up_proj"].unflatten(1, (2, -1))
            yield f"{ours}.mlp.experts.w_down", source[f"{theirs}.mlp.experts.down_proj"]
            continue
        gate_up = [source[f"{theirs}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        yield f"{ours}.mlp.linear_fc1.weight", torch.cat(gate_up)
        yield f"{ours}.mlp.linear_fc2.weight", source[f"{theirs}.mlp.down_proj.weight"]


def copy_weights(llm: LLMConfig, reference: PreTrainedModel, decoder: torch.nn.Module) -> None:
    """Fill every parameter of our decoder from the reference."""
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in megatron_tensors(llm, dict(reference.state_dict())):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"not filled: {sorted(parameters)}"
