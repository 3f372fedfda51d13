"""Updates of LoRA <-> peft's names beside the released layers: `q_proj.lora_A.weight`, `q_proj.lora_B.weight`."""

from __future__ import annotations

from collections.abc import Mapping

from parrot_sys.models.llm import LLMConfig
from parrot_sys.models.tensor_map import Pack, Shape, TensorMap, Unpack, alone, copied, single
from parrot_sys.modules.lora import LoRAConfig

LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight")
"""Of the released names, as peft exports them and as it holds them in the model."""


def lora_maps(
    lora: LoRAConfig | None,
    name: str,
    keys: Mapping[str, Shape],
    *,
    pack: Pack = single,
    unpack: Unpack = alone,
) -> list[TensorMap]:
    """Updates beside one linear layer of the model <-> peft's names beside the released layers.

    Args:
        lora: settings; no maps without.
        name: of the linear layer in the model.
        keys: released name of each projection in it (without `.weight`) -> (out, in).
        pack, unpack: those of the linear layer's own rows.
    """
    maps = []
    for key, (rows, columns) in keys.items():
        target = next((name for name in lora.targets if key.endswith(f".{name}")), None) if lora else None
        if lora is None or target is None:
            continue
        ours = f"{name}.lora.projections.{target.replace('.', '_')}"
        maps.append(copied(f"{ours}.a", f"{key}.lora_A.weight", lora.rank, columns))
        maps.append(
            TensorMap(
                name=f"{ours}.b",
                keys=(f"{key}.lora_B.weight",),
                shapes=((rows, lora.rank),),
                pack=pack,
                unpack=unpack,
            )
        )
    return maps


def llm_lora_maps(config: LLMConfig, lora: LoRAConfig | None, prefix: str = "") -> list[TensorMap]:
    """Updates of the decoder's linear layers."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    width = config.kv_channels * config.num_attention_heads
    kv_width = config.kv_channels * config.num_query_groups
    maps = []
    for layer in range(config.num_layers):
        ours, key = f"{prefix}decoder.layers.{layer}", f"model.layers.{layer}"
        rows = {"q": width, "k": kv_width, "v": kv_width}
        qkv = {f"{key}.self_attn.{part}_proj": (count, hidden) for part, count in rows.items()}
        gate_up = {f"{key}.mlp.{part}_proj": (ffn, hidden) for part in ("gate", "up")}
        maps += lora_maps(lora, f"{ours}.self_attention.linear_qkv", qkv)
        maps += lora_maps(lora, f"{ours}.self_attention.linear_proj", {f"{key}.self_attn.o_proj": (hidden, width)})
        maps += lora_maps(lora, f"{ours}.mlp.linear_fc1", gate_up)
        maps += lora_maps(lora, f"{ours}.mlp.linear_fc2", {f"{key}.mlp.down_proj": (hidden, ffn)})
    return maps


def is_lora(key: str) -> bool:
    """Whether a released tensor is part of an update."""
    return key.endswith(LORA_ENDINGS)
