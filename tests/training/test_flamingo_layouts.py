"""MultiModal-GPT trains under every layout like in one process; latents travel through the pipeline and back."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import ALL, FLAMINGO, Run, assert_same, layout, train

DEEP = replace(FLAMINGO, llm=replace(FLAMINGO.llm, num_layers=8), flamingo=replace(FLAMINGO.flamingo, every_n_layers=3))
PREVIOUS = replace(FLAMINGO, lora=None, flamingo=replace(FLAMINGO.flamingo, media_rule="previous"))
NOTHING = dict.fromkeys((*ALL, "resampler", "cross_attention"), False)
"""All frozen but LoRA, as MultiModal-GPT was trained."""


@functools.cache
def one_process(config: ParrotConfig, only_lora: bool = False) -> Run:
    return train(config, trainable=NOTHING if only_lora else ALL)


@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(FLAMINGO, layout(tensor=2), {}, id="tp2"),
        pytest.param(FLAMINGO, layout(pipeline=2), {}, id="pp2"),
        pytest.param(DEEP, layout(pipeline=4, chunks=2), {}, id="pp4-vpp2"),
        pytest.param(FLAMINGO, ParallelConfig(), {"data_parallel": 2, "overlap": True}, id="dp2-overlap"),
        pytest.param(FLAMINGO, layout(context=2), {}, id="cp2"),
        pytest.param(FLAMINGO, layout(tensor=2, pipeline=2, sequence=True), {"recompute": "full"}, id="tp2-sp-pp2"),
    ],
)
def test_trains_like_one_process(config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    assert_same(train(config, parallel, **settings), one_process(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(PREVIOUS, layout(tensor=2, sequence=True), {}, id="previous-tp2-sp"),
        pytest.param(PREVIOUS, layout(pipeline=2, chunks=2), {"recompute": "full"}, id="previous-pp2-vpp2-recompute"),
        pytest.param(PREVIOUS, layout(context=2), {"data_parallel": 2, "distributed": True}, id="previous-cp2-dp2"),
        pytest.param(PREVIOUS, layout(tensor=2, context=2, sequence=True), {}, id="previous-tp2-sp-cp2"),
        pytest.param(FLAMINGO, layout(tensor=2, context=2), {}, id="tp2-cp2"),
        pytest.param(FLAMINGO, layout(pipeline=2, context=2), {}, id="pp2-cp2"),
        pytest.param(FLAMINGO, layout(pipeline=2), {"data_parallel": 2, "distributed": True}, id="pp2-dp2-zero1"),
        pytest.param(DEEP, layout(pipeline=4, chunks=2, tensor=2, sequence=True), {}, id="tp2-sp-pp4-vpp2"),
        pytest.param(DEEP, layout(pipeline=2, pipeline_layers=(6, 2)), {}, id="pp2-6-and-2-layers"),
    ],
)
def test_more_layouts_train_like_one_process(
    config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]
) -> None:
    assert_same(train(config, parallel, **settings), one_process(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        pytest.param(layout(tensor=2, sequence=True), {"recompute": "full"}, id="tp2-sp-recompute"),
        pytest.param(layout(pipeline=2, chunks=2), {"data_parallel": 2, "overlap": True}, id="pp2-vpp2-dp2"),
        pytest.param(layout(context=2), {}, id="cp2"),
    ],
)
def test_lora_alone_learns_like_in_one_process(parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    reference = one_process(FLAMINGO, only_lora=True)
    assert reference.gradients
    assert all(is_lora(name) for name in reference.gradients)
    assert_same(train(FLAMINGO, parallel, trainable=NOTHING, **settings), reference)
