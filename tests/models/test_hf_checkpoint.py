"""Key maps: packing is exact, complete and sharded as Megatron shards; wrong checkpoints are described in full."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from parrot_sys.errors import CheckpointError
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.models.llm import LLMConfig, llm_maps
from parrot_sys.models.tensor_map import TensorMap, check_tensors, pack_qkv, unpack_qkv
from parrot_sys.models.tower_maps import tower_maps
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.image_rows import projector_maps
from parrot_sys.systems.maps import is_carried, parrot_maps
from parrot_sys.towers import VisionConfig

LLM = LLMConfig(
    hidden_size=24, num_layers=2, num_attention_heads=6, num_query_groups=2, ffn_hidden_size=20, vocab_size=40
)
VISION = VisionConfig(
    image_size=14, patch_size=7, hidden_size=12, num_layers=3, num_attention_heads=3, ffn_hidden_size=10
)
CONFIG = ParrotConfig(vision=VISION, llm=LLM, moe=TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=5))


def _released(maps: list[TensorMap]) -> dict[str, torch.Tensor]:
    return {key: torch.randn(shape) for entry in maps for key, shape in zip(entry.keys, entry.shapes, strict=True)}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(
            CONFIG, llm=dataclasses.replace(LLM, tie_word_embeddings=True, qkv_bias=False, head_dim=10)
        ),
        dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, type="siglip", select_layer=-1)),
        dataclasses.replace(CONFIG, moe=TextGuidedMoEConfig(num_experts=0), projector=ProjectorConfig(type="linear")),
        dataclasses.replace(
            CONFIG, vision=dataclasses.replace(VISION, select_layer=0), projector=ProjectorConfig(type="mlp3x_gelu")
        ),
        dataclasses.replace(
            CONFIG, vision=VisionConfig(type="efficientnet_lite0", hidden_size=1280, activation="relu6")
        ),
        dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, routing="topk", expert_bias=True)),
    ],
    ids=[
        "released",
        "tied-no-bias-wide-heads",
        "siglip",
        "no-experts-linear",
        "select-embeddings",
        "efficientnet",
        "bias",
    ],
)
def test_packing_moves_every_value_once(config: ParrotConfig) -> None:
    maps = parrot_maps(config)
    released = _released(maps)
    keys = [key for entry in maps for key in entry.keys]
    assert len(keys) == len(set(keys))
    assert len({entry.name for entry in maps}) == len(maps)
    for entry in maps:
        packed = entry.pack([released[key] for key in entry.keys])
        assert packed.numel() == sum(released[key].numel() for key in entry.keys)
        for key, part in zip(entry.keys, entry.unpack(packed), strict=True):
            assert torch.equal(part, released[key]), key


def test_released_names() -> None:
    keys = {key for entry in parrot_maps(CONFIG) for key in entry.keys}
    tower = "model.vision_tower.vision_tower.vision_model."
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.moe_model.gate.weight",
        "model.moe_model.experts.2.up_proj.weight",
        f"{tower}embeddings.class_embedding",
        f"{tower}pre_layrnorm.weight",
        f"{tower}encoder.layers.2.mlp.fc2.bias",
        f"{tower}post_layernorm.bias",
    } <= keys
    linear = dataclasses.replace(CONFIG, projector=ProjectorConfig(type="linear"))
    assert [key for entry in projector_maps(linear) for key in entry.keys] == [
        "model.mm_projector.weight",
        "model.mm_projector.bias",
    ]


def test_qkv_is_grouped() -> None:
    """Megatron wants for each query group its queries, its key, its value."""
    q, k, v = torch.arange(6.0), torch.tensor([10.0, 11.0]), torch.tensor([20.0, 21.0])
    packed = pack_qkv([q, k, v], groups=2)
    assert packed.tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]
    assert [part.tolist() for part in unpack_qkv(packed, groups=2, rows=(6, 2, 2))] == [
        q.tolist(),
        k.tolist(),
        v.tolist(),
    ]


@pytest.mark.parametrize(("select_layer", "run"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (2, 2), (3, 3)])
def test_blocks_that_run(select_layer: int, run: int) -> None:
    config = dataclasses.replace(VISION, select_layer=select_layer)
    assert config.num_layers_run == run
    maps = tower_maps(config)
    assert len({entry.name.split(".")[2] for entry in maps if entry.name.startswith("encoder.")}) == run
    assert sum(entry.name.startswith("unused.") for entry in maps) == 16 * (3 - run) + 2  # q, k, v stay apart there


def test_efficientnet_has_its_own_names() -> None:
    assert {
        entry.name
        for entry in tower_maps(VisionConfig(type="efficientnet_lite0", hidden_size=1280, activation="relu6"))
    } == set(EfficientNetLite0().state_dict())


def test_check_tensors_lists_everything() -> None:
    maps = llm_maps(LLM)
    found = {key: tuple(tensor.shape) for key, tensor in _released(maps).items()}
    check_tensors(maps, found, "here")
    del found["lm_head.weight"], found["model.norm.weight"]
    found |= {"model.embed_tokens.weight": (41, 24), "extra.weight": (3,)}
    with pytest.raises(CheckpointError) as error:
        check_tensors(maps, found, "here")
    assert str(error.value).splitlines() == [
        "here does not fit the model that its config.json describes.",
        "2 missing:",
        "  lm_head.weight [40, 24]",
        "  model.norm.weight [24]",
        "1 unexpected:",
        "  extra.weight [3]",
        "1 with another shape:",
        "  model.embed_tokens.weight: wanted [40, 24], got [41, 24]",
    ]


def test_what_is_carried() -> None:
    tied = dataclasses.replace(CONFIG, llm=dataclasses.replace(LLM, tie_word_embeddings=True))
    bypassed = dataclasses.replace(CONFIG, moe=TextGuidedMoEConfig(num_experts=0))
    assert is_carried("model.layers.0.self_attn.rotary_emb.inv_freq", CONFIG)
    siglip = dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, type="siglip"))
    head = "model.vision_tower.vision_tower.vision_model.head.probe"
    assert is_carried(head, siglip)
    assert not is_carried(head, CONFIG)
    assert is_carried("lm_head.weight", tied)
    assert not is_carried("lm_head.weight", CONFIG)
    assert is_carried("model.moe_model.gate.weight", bypassed)
    assert not is_carried("model.moe_model.gate.weight", CONFIG)
