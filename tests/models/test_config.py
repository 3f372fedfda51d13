"""Sizes and coefficients of the model that make no sense are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parrot_sys.config_values import config_from_dict
from parrot_sys.errors import ConfigError
from parrot_sys.models.efficientnet import EfficientNetLite0
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import VisionConfig

LLM_SIZES = ("hidden_size", "num_layers", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
VISION_SIZES = ("image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        *(("llm", {name: value}, f"llm.{name}") for name in LLM_SIZES for value in (0, -1)),
        ("llm", {"head_dim": 0}, "llm.head_dim"),
        ("llm", {"num_query_groups": 3}, "llm.num_query_groups=3"),
        ("llm", {"hidden_size": 4095}, "llm.hidden_size"),
        *(("vision", {name: value}, f"vision.{name}") for name in VISION_SIZES for value in (0, -1)),
        ("vision", {"hidden_size": 1000}, "vision.hidden_size"),
        ("vision", {"patch_size": 337}, "vision.patch_size"),
        ("vision", {"activation": "relu6"}, "vision.activation"),
        ("vision", {"type": "efficientnet_lite0"}, "vision.hidden_size must be 1280"),
        *(
            ("moe", {name: value}, f"moe.{name}")
            for name in (
                *("aux_loss_coeff", "z_loss_coeff", "information_coeff", "evenness_coeff", "entropy_coeff"),
                "bias_update_rate",
            )
            for value in (-1, "nan")
        ),
        ("moe", {"residual_weight": "inf"}, "moe.residual_weight"),
        ("moe", {"router_scale": 0}, "moe.router_scale"),
        ("moe", {"router_scale_start": 0, "router_scale_steps": 3}, "moe.router_scale_start must be"),
        ("moe", {"router_scale_start": 2.0}, "moe.router_scale_steps belong together"),
        ("moe", {"router_scale_steps": 5}, "moe.router_scale_steps belong together"),
        ("moe", {"expert_bias": True}, 'moe.expert_bias needs moe.routing="topk"'),
        ("moe", {"topk": 7}, "moe.topk"),
        ("moe", {"topk": 0}, "moe.topk"),
        ("moe", {"topk": 7, "routing": "topk"}, "moe.topk"),
        ("moe", {"num_experts": 1, "routing": "topk"}, "moe.topk"),
    ],
)
def test_bad_settings_of_the_model_are_named(part: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_from_dict(ParrotConfig, {part: values})


def test_an_unknown_activation_of_a_checkpoint_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vision\.activation must be one of quick_gelu, .*, got 'swish'"):
        VisionConfig(activation="swish")  # type: ignore[arg-type]


def test_one_dense_expert_needs_no_topk() -> None:
    assert TextGuidedMoEConfig(num_experts=1).topk == 2


@pytest.mark.parametrize("side", [32, 33, 64, 100])
def test_rows_of_efficientnet(side: int) -> None:
    vision = VisionConfig(type="efficientnet_lite0", image_size=side, hidden_size=1280)
    assert EfficientNetLite0()(torch.zeros(1, 3, side, side)).shape == (1, vision.num_visual_rows, 1280)
