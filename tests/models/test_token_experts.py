"""Settings of token-routed decoders: config.json there and back, the layers that have experts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from parrot_sys.cli import list_presets
from parrot_sys.config_values import config_from_dict, read_yaml
from parrot_sys.errors import ConfigError
from parrot_sys.models.llm import LLMConfig, TokenExpertsConfig, llm_config_from_hf, llm_fields, llm_maps
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.planning.config import PlanConfig
from parrot_sys.planning.weights import stage_weights
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import config_from_hf, config_to_hf
from parrot_sys.systems.layout import Layout

EXPERTS = TokenExpertsConfig(num_experts=8, topk=3, ffn_hidden_size=20)
LLM = LLMConfig(
    family="qwen3_moe",
    hidden_size=32,
    num_layers=4,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=56,
    vocab_size=96,
    qkv_bias=False,
    experts=EXPERTS,
)
JSON = {**llm_fields(LLM), "model_type": "qwen3_moe"}


@st.composite
def _decoders(draw: st.DrawFn) -> LLMConfig:
    layers = draw(st.integers(1, 6))
    count = draw(st.integers(2, 9))
    step = draw(st.integers(1, layers))
    sparse = [layer for layer in range(layers) if (layer + 1) % step == 0]
    kept = draw(st.sampled_from(sparse))
    dense = draw(st.sets(st.integers(0, layers - 1).filter(lambda layer: layer != kept)) if layers > 1 else st.just(()))
    topk = draw(st.integers(1, count))
    experts = TokenExpertsConfig(
        num_experts=count,
        topk=topk,
        ffn_hidden_size=draw(st.integers(1, 40)),
        renormalize=topk > 1 and draw(st.booleans()),
        sparse_step=step,
        dense_layers=tuple(sorted(dense)),
    )
    return replace(LLM, num_layers=layers, experts=experts)


@given(llm=_decoders(), own=st.integers(0, 5), used=st.booleans())
@settings(max_examples=30, deadline=None)
def test_config_json_keeps_both_kinds_of_experts(llm: LLMConfig, own: int, used: bool, tmp_path_factory: Any) -> None:
    moe = replace(ParrotConfig().moe, num_experts=own, ffn_hidden_size=12)
    config, folder = ParrotConfig(llm=llm, moe=moe), tmp_path_factory.mktemp("json")
    hf = config_to_hf(config, None, folder)
    assert hf["model_type"] == "parrot_qwen3_moe"
    assert llm_config_from_hf({**hf, "model_type": "qwen3_moe"}) == llm
    again = config_from_hf(hf, folder)
    assert again.llm == llm
    assert again.moe.num_experts == own
    assert not own or again == config
    bypassed = config_from_hf({**hf, "use_moe": False}, folder)
    assert (bypassed.llm, bypassed.moe.num_experts) == (llm, 0)


@given(llm=_decoders())
@settings(max_examples=15, deadline=None)
def test_layers_and_tensors_are_those_of_transformers(llm: LLMConfig) -> None:
    """From the file that transformers writes, which has another name for the number of experts."""
    theirs = Qwen3MoeConfig(**llm_fields(llm))
    assert llm_config_from_hf(theirs.to_dict()) == llm
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(theirs)
    routed = [layer for layer in range(llm.num_layers) if hasattr(model.model.layers[layer].mlp, "experts")]
    assert routed == [layer for layer in range(llm.num_layers) if llm.has_experts(layer)]
    count = sum(torch.Size(shape).numel() for entry in llm_maps(llm) for shape in entry.shapes)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    # A row passes all matrices but the experts that it did not choose.
    unused = llm.experts.num_experts - llm.experts.topk
    passed = sum(parameter.numel() for layer in model.model.layers for parameter in layer.mlp.parameters())
    passed -= len(routed) * unused * 3 * llm.hidden_size * llm.experts.ffn_hidden_size
    assert sum(map(llm.mlp_weights_of_layer, range(llm.num_layers))) == passed


def test_the_preset_is_the_published_size() -> None:
    config = config_from_dict(ParrotConfig, read_yaml(list_presets()["parrot_qwen3_30b_a3b"])["model"])
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**llm_fields(config.llm)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_532_122_624
    planned = stage_weights(PlanConfig(model=config).job(), Layout(), 0)
    assert sum(weight.total for weight in planned if weight.component == "llm") == 30_532_122_624


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 9}, r"llm.experts.topk must be in \[1, llm.experts.num_experts=8\], got 9"),
        ({"topk": 1}, "llm.experts.renormalize must be false with llm.experts.topk=1"),
        ({"num_experts": 0}, "llm.experts.num_experts must be >= 1, got 0"),
        ({"sparse_step": 0}, "llm.experts.sparse_step must be >= 1, got 0"),
        ({"dense_layers": (2, 2)}, r"llm.experts.dense_layers must name layers >= 0, each once, got \[2, 2\]"),
        ({"dense_layers": (4,)}, r"llm.experts.dense_layers must be < llm.num_layers=4, got \[4\]"),
        ({"sparse_step": 5}, "llm.experts must be in one layer at least"),
    ],
)
def test_experts_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(LLM, experts=replace(EXPERTS, **changes))


def test_experts_belong_to_their_family() -> None:
    with pytest.raises(ConfigError, match=r"llm.experts must be set with llm.family=qwen3_moe, got none"):
        replace(LLM, experts=None)
    with pytest.raises(ConfigError, match=r"llm.experts must be unset with llm.family=qwen3, got experts"):
        replace(LLM, family="qwen3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_router_logits": True}, "output_router_logits must be False, got True"),
        ({"num_experts": None}, "num_local_experts is missing"),
        ({"mlp_only_layers": ["first"]}, r"mlp_only_layers\[0\] must be"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be"),
    ],
)
def test_files_that_ask_for_something_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llm_config_from_hf({**JSON, **changes}, Path("config.json"))


def test_experts_have_no_low_rank_updates() -> None:
    with pytest.raises(ConfigError, match=r"model.lora.targets must leave out .* got up_proj"):
        ParrotConfig(llm=LLM, lora=LoRAConfig(targets=("q_proj", "up_proj")))
    ParrotConfig(llm=LLM, lora=LoRAConfig())
