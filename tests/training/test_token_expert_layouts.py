"""Token-routed experts in the decoder train alike on every layout, beside Parrot's own and in the other systems."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.llm import TokenExpertsConfig
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import ALL, FLAMINGO, QWEN3, WINGS, Run, assert_same, layout, train

LLM = replace(QWEN3.llm, family="qwen3_moe", experts=TokenExpertsConfig(num_experts=8, topk=3, ffn_hidden_size=20))
ROUTED = replace(QWEN3, llm=LLM)
"""Also top-k routing of images, with auxiliary losses."""
SPARSE = TokenExpertsConfig(num_experts=4, topk=2, ffn_hidden_size=20, renormalize=False, sparse_step=2)
MIXED = replace(ROUTED, llm=replace(LLM, experts=SPARSE))
"""Experts in every second layer."""
# (Learners of Wings need heads that fill the rows.)
ROUTED_WINGS = replace(WINGS, llm=replace(LLM, head_dim=None))
ROUTED_FLAMINGO = replace(FLAMINGO, llm=LLM)
ROUTED_LORA = replace(ROUTED, lora=LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj", "o_proj")))
SLOW = pytest.mark.slow
BOTH = layout(tensor=2, sequence=True, experts=2, expert_tensor=1)


@functools.cache
def one_process(config: ParrotConfig, frozen: bool = False) -> Run:
    return train(config, trainable=dict.fromkeys(ALL, not frozen))


@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(ROUTED, BOTH, {"data_parallel": 2}, id="tp2-sp-ep2-etp1-dp2"),
        pytest.param(
            ROUTED, layout(tensor=2, sequence=True, experts=2), {"data_parallel": 2}, id="tp2-sp-ep2-etp2", marks=SLOW
        ),
        pytest.param(ROUTED, layout(pipeline=2), {"recompute": "full"}, id="pp2-recompute", marks=SLOW),
        pytest.param(
            ROUTED, layout(experts=2), {"data_parallel": 2, "overlap": True}, id="ep2-dp2-overlap", marks=SLOW
        ),
        pytest.param(ROUTED, layout(context=2), {}, id="cp2", marks=SLOW),
        pytest.param(ROUTED, layout(context=2, experts=2), {}, id="cp2-ep2", marks=SLOW),
        # Tensor-parallel ranks hold copies of whole experts, and see other rows.
        pytest.param(MIXED, layout(tensor=2, sequence=True, expert_tensor=1), {}, id="tp2-sp-etp1-mixed"),
        pytest.param(
            MIXED,
            layout(pipeline=2, experts=2),
            {"data_parallel": 2, "distributed": True},
            id="pp2-ep2-dp2-zero1-mixed",
        ),
        pytest.param(ROUTED_WINGS, BOTH, {}, id="tp2-sp-ep2-wings", marks=SLOW),
        pytest.param(ROUTED_WINGS, layout(pipeline=2, experts=2), {"data_parallel": 2}, id="pp2-ep2-wings", marks=SLOW),
        pytest.param(ROUTED_FLAMINGO, BOTH, {}, id="tp2-sp-ep2-flamingo", marks=SLOW),
        pytest.param(
            ROUTED_FLAMINGO, layout(pipeline=2, experts=2), {"data_parallel": 2}, id="pp2-ep2-flamingo", marks=SLOW
        ),
    ],
)
def test_trains_like_one_process(config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    reference = one_process(config)
    assert any(".mlp.experts.1.down_proj." in name for name in reference.gradients)
    assert any(".mlp.gate.weight" in name for name in reference.gradients)
    assert_same(train(config, parallel, **settings), reference)


@pytest.mark.slow
def test_lora_beside_experts_learns_like_in_one_process() -> None:
    reference = one_process(ROUTED_LORA, frozen=True)
    assert reference.gradients
    assert all(is_lora(name) for name in reference.gradients)
    assert_same(train(ROUTED_LORA, BOTH, trainable=dict.fromkeys(ALL, False)), reference)
