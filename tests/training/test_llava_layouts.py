"""LLaVA with tiles trains like one process on every layout: losses, every gradient, parameters after three steps."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import ALL, LLAVA, Run, assert_same, layout, train

EXPERTS = TokenExpertsConfig(num_experts=4, topk=2, ffn_hidden_size=20)
ROUTED = replace(LLAVA, llm=replace(LLAVA.llm, family="qwen3_moe", qkv_bias=False, head_dim=10, experts=EXPERTS))
"""Experts in the decoder's layers, which expert-parallel ranks share."""
PLAIN = replace(LLAVA, llava=replace(LLAVA.llava, grids=()))
LORA = replace(LLAVA, lora=LoRAConfig(rank=2, alpha=3.0))
SLOW = pytest.mark.slow


@functools.cache
def one_process(config: ParrotConfig) -> Run:
    return train(config, trainable=ALL)


@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(LLAVA, layout(tensor=2, sequence=True), {}, id="tp2-sp"),
        pytest.param(LLAVA, layout(pipeline=2), {}, id="pp2"),
        pytest.param(ROUTED, layout(experts=2), {"data_parallel": 2}, id="ep2"),
        pytest.param(LLAVA, layout(context=2), {}, id="cp2"),
        pytest.param(LLAVA, layout(tensor=2, pipeline=2), {"recompute": "full"}, id="tp2-pp2-recompute", marks=SLOW),
        pytest.param(LLAVA, layout(pipeline=2, chunks=2, context=2), {}, id="pp2-vpp2-cp2", marks=SLOW),
        pytest.param(
            LLAVA, layout(), {"data_parallel": 2, "distributed": True, "overlap": True}, id="dp2-zero1", marks=SLOW
        ),
        pytest.param(
            ROUTED, layout(tensor=2, sequence=True, experts=2, expert_tensor=1), {}, id="tp2-sp-ep2", marks=SLOW
        ),
        pytest.param(PLAIN, layout(tensor=2), {}, id="tp2-without-tiles", marks=SLOW),
        pytest.param(LORA, layout(tensor=2, sequence=True), {}, id="tp2-sp-lora", marks=SLOW),
    ],
)
def test_trains_like_one_process(config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    reference = one_process(config)
    assert ("image_newline" in reference.gradients) == (config is not PLAIN)
    if config is not PLAIN:
        assert abs(reference.gradients["image_newline"]).max() > 0
    assert_same(train(config, parallel, **settings), reference)
