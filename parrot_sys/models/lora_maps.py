"""Key maps of LoRA: updates beside the linear layers of the model <-> peft's names beside the released layers."""

from __future__ import annotations

from collections.abc import Mapping

from parrot_sys.models.tensor_map import Pack, Shape, TensorMap, Unpack, alone, copied, only
from parrot_sys.modules.lora import LoRAConfig

LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight")
"""Of the released names, as peft exports them and as it holds them in the model."""


def lora_maps(
    lora: LoRAConfig | None,
    name: str,
    keys: Mapping[str, Shape],
    *,
    pack: Pack = only,
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


def is_lora(key: str) -> bool:
    """Whether a released tensor is part of an update."""
    return key.endswith(LORA_ENDINGS)
