"""Key map of the decoders: all families name their tensors alike and leave out what they do not have."""

from __future__ import annotations

from functools import partial

from parrot_sys.models.llm.config import LLMConfig
from parrot_sys.models.tensor_map import TensorMap, copied, pack_rows, qkv_map, unpack_rows


def llm_maps(config: LLMConfig, prefix: str = "") -> list[TensorMap]:
    """Decoder (Megatron's GPTModel, its names after `prefix`) <-> `Qwen2ForCausalLM` and the like."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
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
            TensorMap(
                name=f"{ours}.mlp.linear_fc1.weight",
                keys=(f"{key}.mlp.gate_proj.weight", f"{key}.mlp.up_proj.weight"),
                shapes=((ffn, hidden), (ffn, hidden)),
                pack=pack_rows,
                unpack=partial(unpack_rows, count=2),
                gated=True,
            ),
            copied(f"{ours}.mlp.linear_fc2.weight", f"{key}.mlp.down_proj.weight", hidden, ffn),
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
