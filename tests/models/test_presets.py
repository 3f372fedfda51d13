"""The presets of the papers' sizes build on the meta device with the exact parameter counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from parrot_sys.cli import list_presets
from parrot_sys.config_values import config_from_dict, read_yaml
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.models.llm import llm_fields
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.maps import parrot_maps
from parrot_sys.systems.parts import part_parameters, set_trainable
from parrot_sys.towers import vision_fields

# Projector: 1024 -> H -> H with biases. MoE: 6 experts of 3 H x 4096 and a router of 6 H.
COUNTS = {
    "parrot_7b": (20_979_712, 302_014_464, 7_721_324_544),
    "parrot_14b": (31_467_520, 377_518_080, 14_167_290_880),
    "parrot_32b": (31_467_520, 377_518_080, 32_512_218_112),
    "parrot_qwen3_8b": (20_979_712, 302_014_464, 8_190_735_360),
    "parrot_qwen3_32b": (31_467_520, 377_518_080, 32_762_123_264),
    "parrot_qwen3_30b_a3b": (6_295_552, 151_007_232, 30_532_122_624),
    "parrot_qwen2_7b": (16_522_240, 264_262_656, 7_615_616_512),
}
CLIP_L = 303_507_456
"""Parameters of CLIP ViT-L/14-336's vision model."""


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name: str) -> None:
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()[name])["model"])
    model = build_model(config, device="meta", dtype=torch.bfloat16)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    projector, moe, llm = COUNTS[name]
    assert (count(model.projector), count(model.moe), count(model.decoder)) == (projector, moe, llm)
    tower = sum(tensor.numel() for tensor in (*model.vision_tower.parameters(), *model.vision_tower.buffers()))
    assert tower == CLIP_L
    released = sum(torch.Size(shape).numel() for entry in parrot_maps(config) for shape in entry.shapes)
    assert released == projector + moe + llm + tower
    assert all(parameter.is_meta for parameter in model.parameters())


def test_size_of_multimodal_gpt() -> None:
    """Counts of the public code (open-mmlab/Multimodal-GPT); that of LoRA is what its training log printed."""
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()["multimodal_gpt_9b"])["model"])
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    stage = read_yaml(list_presets()["multimodal_gpt_instruct"])
    set_trainable(model, stage["trainable"])
    parts = {name: sum(p.numel() for p in part) for name, part in part_parameters(model).items()}
    assert (config.vision.num_visual_rows, config.rows_per_image) == (256, 1)
    assert parts["resampler"] == 63_019_008
    assert parts["cross_attention"] == 8 * 139_476_994
    assert parts["lora"] == 23_461_888
    assert parts["llm"] == 6_738_415_616 + 3 * 2 * 4096  # LLaMA-7B and three tokens
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 23_461_888
    released = sum(torch.Size(shape).numel() for entry in parrot_maps(config) for shape in entry.shapes)
    tower = sum(tensor.numel() for tensor in (*model.vision_tower.parameters(), *model.vision_tower.buffers()))
    assert released == sum(parts.values()) - parts["vision"] + tower


def test_size_of_llava() -> None:
    """Those of Qwen3-8B and CLIP's public configurations, the projector with biases, and the newline row."""
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()["llava_next_qwen3_8b"])["model"])
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    parts = {name: sum(p.numel() for p in part) for name, part in part_parameters(model).items()}
    assert (parts["projector"], parts["llm"]) == (20_979_712 + 4096, 8_190_735_360)
    tower = sum(tensor.numel() for tensor in (*model.vision_tower.parameters(), *model.vision_tower.buffers()))
    assert tower == CLIP_L
    released = sum(torch.Size(shape).numel() for entry in parrot_maps(config) for shape in entry.shapes)
    assert released == parts["projector"] + parts["llm"] + tower
    fields = {
        "text_config": llm_fields(config.llm) | {"model_type": "qwen3"},
        "vision_config": vision_fields(config.vision),
    }
    with torch.device("meta"):
        reference = LlavaNextForConditionalGeneration(LlavaNextConfig(**fields))
    assert released == sum(parameter.numel() for parameter in reference.parameters())
    assert max(len(config.tiling.rows(*size).source) for size in config.tiling.resolutions) == 2928


# A learner: 4 x 2 H r; a router: 2 x 4096 + 2. SigLIP so400m without its pooling head: 27 blocks and the final norm.
WINGS_LEARNERS = 134_479_936
WINGS_COUNTS = {"wings_qwen1_5_7b": 7_721_324_544, "wings_llama3_1_8b": 8_030_261_248}


@pytest.mark.parametrize("name", WINGS_COUNTS)
def test_sizes_of_wings(name: str) -> None:
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()[name])["model"])
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    counts = {
        part: sum(parameter.numel() for parameter in parameters) for part, parameters in part_parameters(model).items()
    }
    learners = counts["visual_learners"] + counts["textual_learners"]
    assert (counts["projector"], learners, counts["llm"]) == (21_504_000, WINGS_LEARNERS, WINGS_COUNTS[name])
    assert counts["visual_learners"] == 32 * 2_097_152
    assert config.rows_per_image == 729
    released = sum(torch.Size(shape).numel() for entry in parrot_maps(config) for shape in entry.shapes)
    tower = sum(tensor.numel() for tensor in (*model.vision_tower.parameters(), *model.vision_tower.buffers()))
    assert released == sum(counts.values()) - counts["vision"] + tower
