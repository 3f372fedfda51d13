"""Every decoder family in every system: text alone is what transformers' own model makes of it, and nothing is lost.

The parts that a system adds say nothing about text at their initial values (learners that add nothing, closed gates, no
image), so that logits, gradients and greedy tokens must be those of the bare decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from transformers import PreTrainedModel

from parrot_sys.errors import ConfigError
from parrot_sys.files import read_json
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.megatron.state_dict import model_tensors
from parrot_sys.models.llm import LLMConfig, llm_config_from_hf
from parrot_sys.models.tensor_files import TensorFiles
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.systems.build import build_model
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.export import export_released
from parrot_sys.systems.hf_config import config_from_hf
from parrot_sys.systems.load import load_released
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.towers import vision_config_from_hf
from tests.megatron.decoder_reference import (
    LLAMA,
    QWEN3,
    QWEN3_MOE,
    QWEN3_MOE_MIXED,
    TINY,
    build_reference,
    megatron_tensors,
)

TOWER = Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "clip-vit-tiny"
VISION = vision_config_from_hf(read_json(TOWER / "config.json"), path=str(TOWER))
NO_EXPERTS = TextGuidedMoEConfig(num_experts=0)
SYSTEMS: dict[str, dict[str, Any]] = {
    "parrot": {"moe": TextGuidedMoEConfig(num_experts=2, ffn_hidden_size=8)},
    "wings": {"moe": NO_EXPERTS, "wings": WingsConfig(rank=2, router_positions=64), "max_seq_len": 64},
    "multimodal_gpt": {
        "moe": NO_EXPERTS,
        "template": "instruction",
        "flamingo": FlamingoConfig(
            resampler=ResamplerConfig(num_latents=3, num_layers=1, num_attention_heads=2, head_dim=5, ffn_multiplier=2),
            cross_attention=GatedCrossAttentionConfig(num_attention_heads=4, head_dim=6, ffn_multiplier=2),
            every_n_layers=2,
            image_token_id=95,
        ),
    },
}
FAMILIES = {"qwen2": TINY, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "mixed": QWEN3_MOE_MIXED, "llama": LLAMA}
# Each family with one system and each system with one family in every run of the tests; the other pairs are slow.
QUICK = {
    ("qwen2", "parrot"),
    ("llama", "wings"),
    ("qwen3", "multimodal_gpt"),
    ("mixed", "parrot"),
    ("qwen3_moe", "parrot"),
}


def _pairs() -> Iterator[ParameterSet]:
    for pair in itertools.product(FAMILIES, SYSTEMS):
        yield pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)


PROMPT = torch.tensor([[5, 17, 33, 2, 71, 8, 40]])


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _sizes(family: str, system: str) -> LLMConfig:
    llm = FAMILIES[family]
    # Heads of learners fill the rows, so those of the decoder must.
    return dataclasses.replace(llm, head_dim=None) if system == "wings" else llm


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


def _start(family: str, system: str, folder: Path) -> tuple[PreTrainedModel, ParrotForConditionalGeneration]:
    """transformers' model, and the system started from what it saved."""
    reference = build_reference(_sizes(family, system)).eval()
    reference.save_pretrained(folder)
    llm = llm_config_from_hf(read_json(folder / "config.json"))
    assert llm == _sizes(family, system)
    model = build_model(ParrotConfig(llm=llm, vision=VISION, **{"max_seq_len": 128, **SYSTEMS[system]}))
    load_released(model, folder)
    return reference, ParrotForConditionalGeneration(model)


@pytest.mark.parametrize(("family", "system"), list(_pairs()))
def test_text_is_what_transformers_makes_of_it(family: str, system: str, tmp_path: Path) -> None:
    reference, ours = _start(family, system, tmp_path / "decoder")
    wanted = reference(PROMPT, labels=PROMPT)
    got = ours(PROMPT, labels=PROMPT)
    assert _relative(got.logits, wanted.logits) < 1e-4
    assert _relative(got.loss, wanted.loss) < 1e-4
    wanted.loss.backward()
    got.loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    decoder = dict(ours.model.decoder.named_parameters())
    for name, gradient in megatron_tensors(ours.config.llm, gradients):
        assert _relative(decoder[name].grad, gradient) < 1e-3, name
    greedy = reference.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=12), greedy)


@pytest.mark.parametrize(("family", "system"), list(_pairs()))
def test_export_and_import_are_bit_equal(family: str, system: str, tmp_path: Path) -> None:
    _, ours = _start(family, system, tmp_path / "decoder")
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.copy_(torch.randn_like(parameter) if parameter.abs().max() == 0 else parameter)
    export_released(ours.model, tmp_path / "exported")
    hf = json.loads((tmp_path / "exported" / "config.json").read_text(encoding="utf-8"))
    assert hf["model_type"] == (system if system == "multimodal_gpt" else f"{system}_{FAMILIES[family].family}")
    config = config_from_hf(hf, tmp_path / "exported")
    assert dataclasses.replace(config, vision=VISION) == ours.config
    again = build_model(config)
    load_released(again, tmp_path / "exported")
    before, after = model_tensors(ours.model), model_tensors(again)
    assert before.keys() == after.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    with TensorFiles(tmp_path / "exported") as files, TensorFiles(tmp_path / "decoder") as saved:
        for key in saved.names():
            assert torch.equal(files.tensor(key), saved.tensor(key)), key


def test_an_unknown_family_is_named(tmp_path: Path) -> None:

    hf = {**TINY_JSON, "model_type": "mistral"}
    with pytest.raises(ConfigError, match="model_type must be one of qwen2, qwen3, qwen3_moe, llama, got 'mistral'"):
        llm_config_from_hf(hf)
    for family, switch in (("qwen2", "use_sliding_window"), ("qwen3", "attention_bias"), ("llama", "mlp_bias")):
        with pytest.raises(ConfigError, match=f"{switch} must be False, got True"):
            llm_config_from_hf({**TINY_JSON, "model_type": family, switch: True})
    with pytest.raises(ConfigError, match=r"llm.qkv_bias must be false with llm.family=qwen3, got true"):
        LLMConfig(family="qwen3")


def test_settings_from_before_there_were_families_are_understood() -> None:
    assert LLMConfig().family == "qwen2"
    assert LLMConfig(qkv_bias=False).family == "llama"


TINY_JSON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "vocab_size": 96,
}
