"""Key maps: which released tensors make up which tensor of MultimodalModel, in plain torch.

The released layout is that of the public Parrot code: a Qwen2 decoder (`model.layers.*`, `model.embed_tokens`,
`model.norm`, `lm_head`), `model.mm_projector.*`, `model.moe_model.{gate,experts.N.{gate,up,down}_proj}` and, inside or
beside it, the tower `model.vision_tower.vision_tower.vision_model.*`. Megatron keeps q, k, v of a layer in one tensor
(query group by query group) and gate and up of a SwiGLU in another; packing only moves rows, so import and export are
bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from parrot_sys.errors import CheckpointError
from parrot_sys.models.flamingo_maps import as_in_multimodal_gpt, flamingo_maps
from parrot_sys.models.llm import llm_maps
from parrot_sys.models.lora_maps import llm_lora_maps
from parrot_sys.models.parrot import ParrotConfig
from parrot_sys.models.tensor_map import Shape, TensorMap, copied
from parrot_sys.models.tower_maps import VISION_MODEL, is_passed_over, tower_maps
from parrot_sys.models.wings_hf import wings_maps
from parrot_sys.modules.text_guided_moe import pack_released, released_keys, unpack_released

TOWER_PREFIX = "model.vision_tower.vision_tower."


def projector_maps(config: ParrotConfig, prefix: str = "projector.") -> list[TensorMap]:
    """Projector <-> `model.mm_projector.*` (`linear`: one layer without a number, as LLaVA saves it)."""
    hidden = config.llm.hidden_size
    maps = []
    for index in range(config.projector.depth):
        columns = config.vision.hidden_size if index == 0 else hidden
        released = "" if config.projector.type == "linear" else f"{2 * index}."
        maps.append(copied(f"{prefix}{2 * index}.weight", f"model.mm_projector.{released}weight", hidden, columns))
        maps.append(copied(f"{prefix}{2 * index}.bias", f"model.mm_projector.{released}bias", hidden))
    return maps


def moe_maps(config: ParrotConfig, prefix: str = "moe.") -> list[TensorMap]:
    """TextGuidedMoE's fused parameters <-> `model.moe_model.*`."""
    hidden, inner = config.llm.hidden_size, config.moe.ffn_hidden_size
    shapes = {"gate.weight": (config.moe.num_experts, hidden), "down_proj.weight": (hidden, inner)}

    def shape(key: str) -> Shape:
        return shapes.get(key.removeprefix(f"experts.{key.split('.')[1]}."), (inner, hidden))

    return [
        TensorMap(
            name=prefix + name,
            keys=tuple(f"model.moe_model.{key}" for key in keys),
            shapes=tuple(shape(key) for key in keys),
            pack=partial(pack_released, name),
            unpack=partial(unpack_released, name),
            experts=name != "router_weight",
        )
        for name, keys in released_keys(config.moe.num_experts).items()
    ]


def parrot_maps(config: ParrotConfig, *, with_vision_tower: bool = True) -> list[TensorMap]:
    """MultimodalModel <-> the released layout with the tower inside, or without any tower."""
    maps = llm_maps(config.llm, "decoder.") + llm_lora_maps(config.llm, config.lora, "decoder.")
    if config.wings is not None:
        maps += wings_maps(config.wings, config.llm, "decoder.")
    if config.flamingo is None:
        maps += projector_maps(config)
    else:
        maps = as_in_multimodal_gpt(maps) + flamingo_maps(
            config.flamingo, config.llm.hidden_size, config.vision.hidden_size, config.llm.num_layers, config.lora
        )
    if config.moe.num_experts:
        maps += moe_maps(config)
    if with_vision_tower:
        maps += tower_maps(config.vision, "vision_tower.", TOWER_PREFIX + VISION_MODEL)
    return maps


def is_carried(key: str, config: ParrotConfig) -> bool:
    """Whether a released tensor that the model does not use may be in a checkpoint; export writes it back.

    Buffers that older transformers versions saved, SigLIP's pooling head, the head copy of tied embeddings, and the MoE
    of a checkpoint that bypasses it (`use_moe: false`).
    """
    tower = TOWER_PREFIX + VISION_MODEL
    return (
        key.endswith(".rotary_emb.inv_freq")
        or (key.startswith(tower) and is_passed_over(key.removeprefix(tower), config.vision))
        or (config.llm.tie_word_embeddings and key == "lm_head.weight")
        or (config.moe.num_experts == 0 and key.startswith("model.moe_model."))
    )


def check_tensors(maps: Iterable[TensorMap], found: Mapping[str, Shape], where: str) -> None:
    """Compare what the model needs with what a checkpoint holds.

    Raises:
        CheckpointError: lists every missing, unexpected and mis-shaped tensor by name.
    """
    wanted = {key: shape for entry in maps for key, shape in zip(entry.keys, entry.shapes, strict=True)}
    missing = [f"  {key} {list(wanted[key])}" for key in sorted(wanted.keys() - found.keys())]
    unexpected = [f"  {key} {list(found[key])}" for key in sorted(found.keys() - wanted.keys())]
    misshaped = [
        f"  {key}: wanted {list(wanted[key])}, got {list(found[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if tuple(wanted[key]) != tuple(found[key])
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("with another shape", misshaped))
    if any(names for _, names in lists):
        report = "\n".join(f"{len(names)} {what}:\n" + "\n".join(names) for what, names in lists if names)
        raise CheckpointError(f"{where} does not fit the model that its config.json describes.\n{report}")
