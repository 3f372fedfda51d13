"""Key map of the decoders: all families name their tensors alike and leave out what they do not have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from parrot_sys.models.llm.config import LLMConfig
from parrot_sys.models.tensor_map import TensorMap, copied, pack_rows, qkv_map, unpack_rows


def llm_maps(config: LLMConfig, prefix: str = "") -> list[TensorMap]:
    """Decoder (Megatron's GPTModel, its names after `prefix`) <-> `Qwen2ForCausalLM` and the like."""
    hidden = config.hidden_size
    width = config.kv_channels * config.num_attention_heads
    kv_width = config.kv_channels * config.num_query_groups
    rows = (width, kv_width, kv_width)
    maps = [copied(f"{prefix}embedding.word_embeddings.weight", "model.embed_tokens.weight", config.vocab_size, hidden)]
    for layer in range(config.num_layers):
        ours, key = f"{prefix}decoder.layers.{layer}", f"model.layers.{layer}"
        qkv, projections = f"{ours}.self_attention.linear_qkv", [f"{key}.self_attn.{part}_proj" for part in "qkv"]
        maps += [
            copied(f"{ours}.input_layernorm.weight", f"{key}.input_layernorm.weight", hidden),
            qkv_map(qkv, projections, "weight", rows, config.num_query_groups, hidden),
            copied(f"{ours}.self_attention.linear_proj.weight", f"{key}.self_attn.o_proj.weight", hidden, width),
            copied(f"{ours}.pre_mlp_layernorm.weight", f"{key}.post_attention_layernorm.weight", hidden),
            *(_expert_maps if config.has_experts(layer) else _mlp_maps)(config, f"{ours}.mlp", f"{key}.mlp"),
        ]
        if config.qk_norm:
            for part in "qk":
                norm = f"{ours}.self_attention.{part}_layernorm.weight"
                maps.append(copied(norm, f"{key}.self_attn.{part}_norm.weight", config.kv_channels))
        if config.qkv_bias:
            maps.append(qkv_map(qkv, projections, "bias", rows, config.num_query_groups))
    maps.append(copied(f"{prefix}decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not config.tie_word_embeddings:
        maps.append(copied(f"{prefix}output_layer.weight", "lm_head.weight", config.vocab_size, hidden))
    return maps


def _mlp_maps(config: LLMConfig, name: str, key: str) -> list[TensorMap]:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    return [
        TensorMap(
            name=f"{name}.linear_fc1.weight",
            keys=(f"{key}.gate_proj.weight", f"{key}.up_proj.weight"),
            shapes=((ffn, hidden), (ffn, hidden)),
            pack=pack_rows,
            unpack=partial(unpack_rows, count=2),
            gated=True,
        ),
        copied(f"{name}.linear_fc2.weight", f"{key}.down_proj.weight", hidden, ffn),
    ]


def _expert_maps(config: LLMConfig, name: str, key: str) -> list[TensorMap]:
    """Router and experts: each has tensors of its own in a checkpoint, and all share two in the model."""
    experts = config.experts
    assert experts is not None, "the layer has experts"
    hidden, inner, numbers = config.hidden_size, experts.ffn_hidden_size, range(experts.num_experts)
    return [
        copied(f"{name}.router.weight", f"{key}.gate.weight", experts.num_experts, hidden),
        TensorMap(
            name=f"{name}.experts.w_gate_up",
            keys=tuple(f"{key}.experts.{e}.{part}_proj.weight" for e in numbers for part in ("gate", "up")),
            shapes=((inner, hidden),) * (2 * experts.num_experts),
            pack=_stack_pairs,
            unpack=_unstack_pairs,
            experts=True,
        ),
        TensorMap(
            name=f"{name}.experts.w_down",
            keys=tuple(f"{key}.experts.{e}.down_proj.weight" for e in numbers),
            shapes=((hidden, inner),) * experts.num_experts,
            pack=lambda tensors: torch.stack(list(tensors)),
            unpack=lambda tensor: list(tensor.unbind()),
            experts=True,
        ),
    ]


def _stack_pairs(tensors: Sequence[Tensor]) -> Tensor:
    """Gate and up [I, H] of each expert, one expert after the other -> [E, 2, I, H]."""
    return torch.stack(list(tensors)).unflatten(0, (-1, 2))


def _unstack_pairs(tensor: Tensor) -> list[Tensor]:
    """The reverse of `_stack_pairs`."""
    return list(tensor.flatten(0, 1).unbind())
