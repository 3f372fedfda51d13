"""config.json <-> ParrotConfig."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPConfig, CLIPVisionConfig, Qwen2Config, SiglipConfig

from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.models.llm import LLMConfig, llm_config_from_hf
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import (
    config_from_hf,
    config_to_hf,
)
from parrot_sys.towers import KNOWN_TOWERS, VisionConfig, vision_config_from_hf

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model"
LLM = LLMConfig(
    hidden_size=64, num_layers=2, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128, vocab_size=640
)


def _fixture() -> dict[str, Any]:
    return json.loads((FIXTURE / "config.json").read_text(encoding="utf-8"))


def _without_path(config: ParrotConfig) -> ParrotConfig:
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, path=None))


def test_fixture() -> None:
    config = config_from_hf(_fixture(), FIXTURE)
    assert config.llm == LLMConfig(
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=4,
        ffn_hidden_size=128,
        vocab_size=640,
        rope_base=10000.0,
        norm_eps=1e-6,
        max_position_embeddings=512,
    )
    assert config.moe == TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=96, residual_weight=1.0)
    assert config.vision.num_visual_rows == 17
    assert config.vision.path == str(FIXTURE.parent / "clip-vit-tiny")
    assert config_to_hf(config, _fixture(), FIXTURE) == _fixture()  # nothing to add, nothing lost


@pytest.mark.parametrize(
    "config",
    [
        ParrotConfig(llm=LLM),
        ParrotConfig(
            llm=LLM,
            moe=TextGuidedMoEConfig(routing="topk", topk=3, renormalize=False, residual="paper", guidance="first_turn"),
        ),
        ParrotConfig(llm=LLM, moe=TextGuidedMoEConfig(residual="none", aux_loss_coeff=0.01), max_seq_len=99),
        ParrotConfig(llm=dataclasses.replace(LLM, head_dim=24, qkv_bias=False, tie_word_embeddings=True)),
        ParrotConfig(llm=LLM, moe=TextGuidedMoEConfig(num_experts=0)),
        ParrotConfig(
            llm=LLM,
            vision=VisionConfig(
                type="efficientnet_lite0",
                image_size=128,
                hidden_size=1280,
                select_layer=-1,
                activation="relu6",
            ),
        ),
    ],
    ids=["plain", "own-routing", "no-residual", "odd-decoder", "no-experts", "efficientnet"],
)
def test_every_setting_comes_back(config: ParrotConfig, tmp_path: Path) -> None:
    hf = json.loads(json.dumps(config_to_hf(config, None, tmp_path)))
    again = config_from_hf(hf, tmp_path)
    if config.moe.num_experts == 0:  # the sizes of experts that do not exist are not kept
        assert again.moe.num_experts == 0
        again = dataclasses.replace(again, moe=config.moe)
    assert again == config


def test_released_fields_carry_no_own_key(tmp_path: Path) -> None:
    original = {
        **_fixture(),
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": 1024,
        "secret": {"a": 1},
    }
    config = config_from_hf(original, tmp_path)
    assert config.vision == KNOWN_TOWERS["clip-vit-large-patch14-336"]
    assert config.vision.num_visual_rows == 577
    changed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, residual_weight=0.25))
    hf = config_to_hf(changed, original, tmp_path)
    assert hf == {**original, "moe_weight": 0.25}
    own = config_to_hf(
        dataclasses.replace(config, moe=dataclasses.replace(config.moe, routing="topk")), original, tmp_path
    )
    assert own["parrot_sys"] == {"moe": {"routing": "topk"}}
    assert own["moe_top_k"] == 2


def test_top_k_of_a_released_file_is_not_used() -> None:
    assert config_from_hf({**_fixture(), "moe_top_k": 2}, FIXTURE).moe.routing == "dense"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mllama"}, "model_type must be one of parrot_qwen2, "),
        ({"model_type": "llava"}, "text_config is missing"),
        ({"mm_vision_select_feature": "patch"}, "select_feature cls_patch, whose first row"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window must be False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.rope_type must be 'default' or 'llama3', got 'yarn'"),
        ({"moe_hidden_size": 65}, r"moe_hidden_size must be 64 \(hidden_size\), got 65"),
        ({"parrot_sys": {"moe": {"topq": 1}}}, r"unknown setting parrot_sys.moe.topq in \S*config.json; the nearest"),
        ({"mm_projector_type": "resampler"}, "projector.type must be"),
    ],
)
def test_refused_settings(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_from_hf({**_fixture(), **change}, FIXTURE)


def test_missing_fields_and_towers(tmp_path: Path) -> None:
    hf = _fixture()
    with pytest.raises(CheckpointError, match=r"the vision tower '\.\./clip-vit-tiny'"):
        config_from_hf(hf, tmp_path / "elsewhere")
    llm = llm_config_from_hf(
        {k: v for k, v in hf.items() if k not in ("max_position_embeddings", "num_key_value_heads", "model_type")}
    )
    assert (llm.max_position_embeddings, llm.num_query_groups) == (32_768, 4)  # the defaults of Qwen2Config
    del hf["num_experts"]
    with pytest.raises(ConfigError, match="num_experts is missing"):
        config_from_hf(hf, FIXTURE)


def test_configurations_written_by_transformers() -> None:
    qwen = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=12345.0
    )
    llm = llm_config_from_hf(json.loads(qwen.to_json_string(use_diff=False)))
    assert (llm.rope_base, llm.num_query_groups, llm.vocab_size) == (12345.0, 2, qwen.vocab_size)
    part = vision_config_from_hf(CLIPVisionConfig(image_size=28, patch_size=7).to_dict())
    assert (part.type, part.num_patches, part.activation) == ("clip", 16, "quick_gelu")
    whole = vision_config_from_hf(CLIPConfig(vision_config={"image_size": 56, "patch_size": 14}).to_dict())
    assert (whole.image_size, whole.num_patches) == (56, 16)
    siglip = vision_config_from_hf(SiglipConfig().to_dict())
    assert (siglip.type, siglip.activation, siglip.layer_norm_eps) == ("siglip", "gelu_pytorch_tanh", 1e-6)
    with pytest.raises(ConfigError, match="model_type must be one of"):
        vision_config_from_hf({"model_type": "resnet"})


def test_absent_keys_have_the_released_defaults() -> None:
    hf = {
        name: value for name, value in _fixture().items() if name not in ("use_moe", "use_moe_residual", "moe_weight")
    }
    assert config_from_hf(hf, FIXTURE).moe == TextGuidedMoEConfig(
        num_experts=6, ffn_hidden_size=96, residual="code", residual_weight=1.0
    )
    assert config_from_hf({**hf, "use_moe": False}, FIXTURE).moe.num_experts == 0


def test_left_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer_padding_side must be 'right', got 'left'"):
        config_from_hf({**_fixture(), "tokenizer_padding_side": "left"}, FIXTURE)
