"""Key maps of MultiModal-GPT's own parts: OpenFlamingo's `perceiver.*` and `lang_encoder.gated_cross_attn_layers.*`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from parrot_sys.models.lora_maps import is_lora, lora_maps
from parrot_sys.models.tensor_map import TensorMap, copied, norm_maps, pack_qkv, unpack_qkv
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig

RESAMPLER_KEY = "perceiver."
BLOCKS_KEY = "lang_encoder.gated_cross_attn_layers."
LORA_KEY = "lang_encoder.base_model.model.model.layers."
"""Updates are named after layers inside peft's wrapper, with `decoder_layer` or `gated_cross_attn_layer` added."""


def resampler_maps(config: FlamingoConfig, width: int, prefix: str = "resampler.") -> list[TensorMap]:
    """`PerceiverResampler` of this width <-> `perceiver.*`."""
    shape = config.resampler
    inner, ffn = shape.num_attention_heads * shape.head_dim, width * shape.ffn_multiplier
    maps = [copied(f"{prefix}latents", f"{RESAMPLER_KEY}latents", shape.num_latents, width)]
    for layer in range(shape.num_layers):
        ours, key = f"{prefix}layers.{layer}", f"{RESAMPLER_KEY}layers.{layer}"
        maps += [
            *norm_maps(f"{ours}.attention.norm_media", f"{key}.0.norm_media", width),
            *norm_maps(f"{ours}.attention.norm_latents", f"{key}.0.norm_latents", width),
            copied(f"{ours}.attention.to_q.weight", f"{key}.0.to_q.weight", inner, width),
            copied(f"{ours}.attention.to_kv.weight", f"{key}.0.to_kv.weight", 2 * inner, width),
            copied(f"{ours}.attention.to_out.weight", f"{key}.0.to_out.weight", width, inner),
            *norm_maps(f"{ours}.mlp.norm", f"{key}.1.0", width),
            copied(f"{ours}.mlp.linear_fc1.weight", f"{key}.1.1.weight", ffn, width),
            copied(f"{ours}.mlp.linear_fc2.weight", f"{key}.1.3.weight", width, ffn),
        ]
    return [*maps, *norm_maps(f"{prefix}norm", f"{RESAMPLER_KEY}norm", width)]


def pack_keys_values(tensors: Sequence[Tensor], *, heads: int) -> Tensor:
    """[key rows of all heads, value rows of all heads] in one tensor -> head by head its key rows, then its values."""
    return pack_qkv(tensors[0].chunk(2), groups=heads)


def unpack_keys_values(tensor: Tensor, *, heads: int) -> list[Tensor]:
    """The reverse of `pack_keys_values`."""
    half = tensor.shape[0] // 2
    return [torch.cat(unpack_qkv(tensor, groups=heads, rows=(half, half)))]


def block_maps(
    config: GatedCrossAttentionConfig, hidden_size: int, media_size: int, ours: str, key: str
) -> list[TensorMap]:
    """One `GatedCrossAttention`, its names after `ours`, <-> the released one, after `key`."""
    inner, ffn = config.num_attention_heads * config.head_dim, hidden_size * config.ffn_multiplier
    return [
        copied(f"{ours}.attention_gate", f"{key}.attn_gate", 1),
        copied(f"{ours}.mlp_gate", f"{key}.ff_gate", 1),
        *norm_maps(f"{ours}.attention.norm", f"{key}.attn.norm", hidden_size),
        copied(f"{ours}.attention.to_q.weight", f"{key}.attn.to_q.weight", inner, hidden_size),
        TensorMap(
            name=f"{ours}.attention.to_kv.weight",
            keys=(f"{key}.attn.to_kv.weight",),
            shapes=((2 * inner, media_size),),
            pack=partial(pack_keys_values, heads=config.num_attention_heads),
            unpack=partial(unpack_keys_values, heads=config.num_attention_heads),
        ),
        copied(f"{ours}.attention.to_out.weight", f"{key}.attn.to_out.weight", hidden_size, inner),
        *norm_maps(f"{ours}.mlp.norm", f"{key}.ff.0", hidden_size),
        copied(f"{ours}.mlp.linear_fc1.weight", f"{key}.ff.1.weight", ffn, hidden_size),
        copied(f"{ours}.mlp.linear_fc2.weight", f"{key}.ff.3.weight", hidden_size, ffn),
    ]


def flamingo_maps(
    config: FlamingoConfig, hidden_size: int, media_size: int, num_layers: int, lora: LoRAConfig | None = None
) -> list[TensorMap]:
    """Resampler, gated blocks and their updates, of a decoder of `num_layers` layers, in `MultimodalModel`'s names."""
    maps = resampler_maps(config, media_size)
    for layer in range(num_layers):
        if config.has_block(layer + 1):
            ours = f"decoder.decoder.layers.{layer}.gated_cross_attention"
            maps += block_maps(config.cross_attention, hidden_size, media_size, ours, f"{BLOCKS_KEY}{layer}")
            key = f"{LORA_KEY}{layer}.gated_cross_attn_layer"
            maps += _as_peft_holds(_block_lora_maps(config.cross_attention, hidden_size, media_size, ours, key, lora))
    return maps


def as_in_multimodal_gpt(maps: Sequence[TensorMap]) -> list[TensorMap]:
    """Maps of the decoder with its updates named as in MultiModal-GPT's checkpoints."""

    def renamed(key: str) -> str:
        if not is_lora(key):
            return key
        layer, _, rest = key.removeprefix("model.layers.").partition(".")
        return f"{LORA_KEY}{layer}.decoder_layer.{rest}"

    return _as_peft_holds([replace(entry, keys=tuple(map(renamed, entry.keys))) for entry in maps])


def _block_lora_maps(
    config: GatedCrossAttentionConfig, hidden_size: int, media_size: int, ours: str, key: str, lora: LoRAConfig | None
) -> list[TensorMap]:
    inner, ffn = config.num_attention_heads * config.head_dim, hidden_size * config.ffn_multiplier
    pack = partial(pack_keys_values, heads=config.num_attention_heads)
    unpack = partial(unpack_keys_values, heads=config.num_attention_heads)
    to_kv = {f"{key}.attn.to_kv": (2 * inner, media_size)}
    return [
        *lora_maps(lora, f"{ours}.attention.to_q", {f"{key}.attn.to_q": (inner, hidden_size)}),
        *lora_maps(lora, f"{ours}.attention.to_kv", to_kv, pack=pack, unpack=unpack),
        *lora_maps(lora, f"{ours}.attention.to_out", {f"{key}.attn.to_out": (hidden_size, inner)}),
        *lora_maps(lora, f"{ours}.mlp.linear_fc1", {f"{key}.ff.1": (ffn, hidden_size)}),
        *lora_maps(lora, f"{ours}.mlp.linear_fc2", {f"{key}.ff.3": (hidden_size, ffn)}),
    ]


def _as_peft_holds(maps: Sequence[TensorMap]) -> list[TensorMap]:
    """Keys with the name of peft's one adapter, which the released checkpoints kept."""
    endings = re.compile(r"\.(lora_[AB])\.weight$")
    return [replace(each, keys=tuple(endings.sub(r".\1.default.weight", key) for key in each.keys)) for each in maps]
