"""Transformers' Qwen2 as the independent reference of our decoder; the copy of its weights into Megatron's layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from parrot_sys.models.llm import LLMConfig

TINY = LLMConfig(
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=56,
    vocab_size=96,
    rope_base=10_000.0,
    max_position_embeddings=128,
)


def build_reference(llm: LLMConfig, seed: int = 0) -> Qwen2ForCausalLM:
    """Randomly initialised Qwen2 with biases and norm weights that are not 0 and 1."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=llm.hidden_size,
            num_hidden_layers=llm.num_layers,
            num_attention_heads=llm.num_attention_heads,
            num_key_value_heads=llm.num_query_groups,
            intermediate_size=llm.ffn_hidden_size,
            vocab_size=llm.vocab_size,
            rope_theta=llm.rope_base,
            rms_norm_eps=llm.norm_eps,
            max_position_embeddings=llm.max_position_embeddings,
            tie_word_embeddings=llm.tie_word_embeddings,
            attn_implementation="eager",
            use_sliding_window=False,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(
                1.0 if parameter.dim() == 1 and parameter.numel() == llm.hidden_size else 0.0
            )
    return model


def _fuse_qkv(llm: LLMConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rows of the three projections -> rows by key/value group: its queries, its key, its value."""
    groups, width = llm.num_query_groups, llm.kv_channels
    parts = [query.unflatten(0, (groups, -1)), key.unflatten(0, (groups, width)), value.unflatten(0, (groups, width))]
    return torch.cat(parts, dim=1).flatten(0, 1)


def megatron_tensors(llm: LLMConfig, source: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name in our decoder, tensor) for the tensors of a Qwen2 state dict (weights or their gradients)."""
    yield "embedding.word_embeddings.weight", source["model.embed_tokens.weight"]
    yield "decoder.final_layernorm.weight", source["model.norm.weight"]
    if not llm.tie_word_embeddings:
        yield "output_layer.weight", source["lm_head.weight"]
    for i in range(llm.num_layers):
        theirs, ours = f"model.layers.{i}", f"decoder.layers.{i}"
        for kind in ("weight", "bias"):
            qkv = [source[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            yield f"{ours}.self_attention.linear_qkv.{kind}", _fuse_qkv(llm, *qkv)
        yield f"{ours}.self_attention.linear_proj.weight", source[f"{theirs}.self_attn.o_proj.weight"]
        yield f"{ours}.input_layernorm.weight", source[f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.pre_mlp_layernorm.weight", source[f"{theirs}.post_attention_layernorm.weight"]
        gate_up = [source[f"{theirs}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        yield f"{ours}.mlp.linear_fc1.weight", torch.cat(gate_up)
        yield f"{ours}.mlp.linear_fc2.weight", source[f"{theirs}.mlp.down_proj.weight"]


def copy_weights(llm: LLMConfig, reference: Qwen2ForCausalLM, decoder: torch.nn.Module) -> None:
    """Fill every parameter of our decoder from the reference."""
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, tensor in megatron_tensors(llm, dict(reference.state_dict())):
            parameters.pop(name).copy_(tensor)
    assert not parameters, f"not filled: {sorted(parameters)}"
