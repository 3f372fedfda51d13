"""Wings under every parallel dimension: losses, every gradient and parameters after three steps as in one process."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import ALL, WINGS, Run, assert_same, layout, train

SOME = replace(WINGS, wings=replace(WINGS.wings, layers=(1, 3)))
"""Two of four layers have learners."""
EVEN = replace(WINGS, wings=replace(WINGS.wings, routing="even"))
"""Without the router's weights."""
DEEP = replace(WINGS, llm=replace(WINGS.llm, num_layers=8))
STAGE_1 = {**dict.fromkeys(ALL, False), "projector": True, "visual_learners": True, "textual_learners": False}


@functools.cache
def one_process(config: ParrotConfig, first_stage: bool = False) -> Run:
    return train(config, trainable=STAGE_1, bypass=("textual_learners",)) if first_stage else train(config)


@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(WINGS, layout(tensor=2), {}, id="tp2", marks=pytest.mark.slow),
        pytest.param(WINGS, layout(tensor=2, sequence=True), {"recompute": "full"}, id="tp2-sp-recompute"),
        pytest.param(WINGS, layout(pipeline=2), {"data_parallel": 2, "overlap": True}, id="pp2-dp2-overlap"),
        pytest.param(SOME, layout(pipeline=4), {}, id="pp4-some-layers", marks=pytest.mark.slow),
        pytest.param(WINGS, layout(pipeline=2, chunks=2), {}, id="pp2-vpp2", marks=pytest.mark.slow),
        pytest.param(DEEP, layout(pipeline=4, chunks=2), {}, id="pp4-vpp2"),
        pytest.param(WINGS, layout(context=2), {}, id="cp2"),
        pytest.param(
            EVEN, layout(tensor=2, sequence=True), {"data_parallel": 2, "overlap": True}, id="tp2-sp-dp2-even"
        ),
        pytest.param(
            WINGS, layout(), {"data_parallel": 2, "distributed": True}, id="dp2-zero1", marks=pytest.mark.slow
        ),
        pytest.param(
            WINGS,
            layout(tensor=2, sequence=True, pipeline=2, context=2),
            {},
            id="tp2-sp-pp2-cp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_trains_like_one_process(config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    reference = one_process(config)
    assert any("reweight_module" in name for name in reference.gradients)
    assert_same(train(config, parallel, **settings), reference)


def test_first_stage_trains_like_one_process() -> None:
    run = train(WINGS, layout(tensor=2, pipeline=2), trainable=STAGE_1, bypass=("textual_learners",))
    reference = one_process(WINGS, first_stage=True)
    assert all("mm_projector" in name or ".attn_pool." in name for name in reference.gradients)
    assert_same(run, reference)


def test_even_routes_leave_the_router_alone() -> None:
    """Its gradient is zero, that of both learners is not."""
    gradients = one_process(EVEN).gradients
    routers = [each for name, each in gradients.items() if "reweight_module" in name]
    learners = [each for name, each in gradients.items() if ".attn_pool." in name or ".attn_t_pool." in name]
    assert routers
    assert not any(each.any() for each in routers)
    assert learners
    assert all(each.any() for each in learners)
