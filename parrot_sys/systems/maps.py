"""Key maps: which released tensors make up which tensor of MultimodalModel, in plain torch.

The released layouts have the decoder's own names (`model.layers.*`, `model.embed_tokens`, `model.norm`, `lm_head`),
those of the system and, inside or beside it, the tower `model.vision_tower.vision_tower.vision_model.*`. Megatron keeps
q, k, v of a layer in one tensor (query group by query group) and gate and up of a SwiGLU in another; packing only moves
rows, so import and export are bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterable

from parrot_sys.models.tensor_map import TensorMap
from parrot_sys.models.tower_maps import is_passed_over, tower_maps
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.registry import system_of


def holds_tower(keys: Iterable[str], config: ParrotConfig) -> bool:
    """Whether a checkpoint with these tensors has the vision tower inside."""
    return any(key.startswith(system_of(config).tower_key) for key in keys)


def parrot_maps(config: ParrotConfig, *, with_vision_tower: bool = True) -> list[TensorMap]:
    """MultimodalModel <-> the released layout with the tower inside, or without any tower."""
    system = system_of(config)
    maps = system.maps(config)
    return maps + tower_maps(config.vision, "vision_tower.", system.tower_key) if with_vision_tower else maps


def is_carried(key: str, config: ParrotConfig) -> bool:
    """Whether a released tensor that the model does not use may be in a checkpoint; export writes it back.

    Buffers that older transformers versions saved, SigLIP's pooling head, the head copy of tied embeddings, and what
    the system says.
    """
    system = system_of(config)
    tower = system.tower_key
    return (
        key.endswith(".rotary_emb.inv_freq")
        or (key.startswith(tower) and is_passed_over(key.removeprefix(tower), config.vision))
        or (config.llm.tie_word_embeddings and key == "lm_head.weight")
        or system.is_carried(key, config)
    )
