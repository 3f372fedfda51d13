"""Every layout trains like one process: losses, every gradient, and parameters after three steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.models.lora_maps import is_lora
from parrot_sys.modules.released_experts import is_expert_bias
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import ALL, DINOV2, LLAMA, LORA, MODEL, QWEN3, TIED, TOPK, Run, assert_same, layout, train

STAGE_1 = {"vision": False, "projector": True, "moe": False, "llm": False}


@functools.cache
def one_process(config: ParrotConfig, frozen: tuple[str, ...] = (), sgd: bool = True) -> Run:
    return train(config, trainable={name: name not in frozen for name in ALL}, sgd=sgd)


@pytest.mark.parametrize(
    ("config", "parallel", "settings"),
    [
        pytest.param(MODEL, layout(pipeline=2), {}, id="pp2"),
        pytest.param(QWEN3, layout(tensor=2, sequence=True), {}, id="tp2-sp-qwen3"),
        pytest.param(DINOV2, layout(tensor=2, pipeline=2), {}, id="tp2-pp2-dinov2", marks=pytest.mark.slow),
        pytest.param(DINOV2, layout(experts=2), {"data_parallel": 2}, id="ep2-dinov2", marks=pytest.mark.slow),
        pytest.param(
            QWEN3, layout(pipeline=2, experts=2), {"data_parallel": 2}, id="pp2-ep2-qwen3", marks=pytest.mark.slow
        ),
        pytest.param(LLAMA, layout(tensor=2, pipeline=2), {}, id="tp2-pp2-llama", marks=pytest.mark.slow),
        pytest.param(LLAMA, layout(experts=2), {"data_parallel": 2}, id="ep2-llama", marks=pytest.mark.slow),
        pytest.param(TIED, layout(pipeline=2), {}, id="pp2-tied"),
        pytest.param(TOPK, layout(pipeline=2), {"data_parallel": 2, "distributed": True}, id="pp2-dp2-topk-zero1"),
        pytest.param(MODEL, layout(pipeline=4), {"recompute": "full"}, id="pp4-recompute"),
        pytest.param(TOPK, layout(pipeline=2, chunks=2), {}, id="pp2-vpp2-topk"),
        pytest.param(
            TIED, layout(pipeline=2, chunks=2), {"data_parallel": 2, "overlap": True}, id="pp2-vpp2-dp2-tied-overlap"
        ),
        pytest.param(MODEL, layout(tensor=2, pipeline=2), {}, id="tp2-pp2", marks=pytest.mark.slow),
        pytest.param(TOPK, layout(tensor=2, pipeline=2, sequence=True), {}, id="tp2-sp-pp2-topk"),
        pytest.param(MODEL, layout(context=2), {}, id="cp2"),
        pytest.param(TOPK, layout(context=2), {"recompute": "full"}, id="cp2-topk-recompute", marks=pytest.mark.slow),
        pytest.param(TIED, layout(context=4), {}, id="cp4-tied"),
        pytest.param(MODEL, layout(tensor=2, context=2), {}, id="tp2-cp2", marks=pytest.mark.slow),
        pytest.param(TOPK, layout(tensor=2, context=2, sequence=True), {}, id="tp2-sp-cp2-topk"),
        pytest.param(
            TOPK,
            layout(context=2),
            {"data_parallel": 2, "overlap": True},
            id="cp2-dp2-topk-overlap",
            marks=pytest.mark.slow,
        ),
        pytest.param(MODEL, layout(context=2), {"data_parallel": 2, "distributed": True}, id="cp2-dp2-zero1"),
        pytest.param(MODEL, layout(pipeline=2, context=2), {}, id="pp2-cp2", marks=pytest.mark.slow),
        pytest.param(TOPK, layout(pipeline=2, chunks=2, context=2), {}, id="pp2-vpp2-cp2-topk"),
        pytest.param(MODEL, layout(pipeline=2, pipeline_layers=(3, 1)), {}, id="pp2-3-and-1-layers"),
        pytest.param(TOPK, layout(context=2, experts=2), {}, id="cp2-ep2-topk"),
        pytest.param(MODEL, layout(experts=2), {"data_parallel": 2}, id="ep2"),
        pytest.param(
            TOPK,
            layout(experts=2),
            {"data_parallel": 2, "overlap": True},
            id="ep2-topk-overlap",
            marks=pytest.mark.slow,
        ),
        pytest.param(TOPK, layout(experts=2), {"data_parallel": 4, "distributed": True}, id="ep2-dp2-topk-zero1"),
        pytest.param(TOPK, layout(experts=4), {"data_parallel": 4}, id="ep4-topk"),
        pytest.param(TOPK, layout(expert_tensor=2), {"data_parallel": 2}, id="etp2-topk"),
        pytest.param(MODEL, layout(tensor=2), {}, id="tp2-etp2", marks=pytest.mark.slow),
        pytest.param(TOPK, layout(tensor=2, sequence=True), {}, id="tp2-sp-etp2-topk"),
        pytest.param(TOPK, layout(tensor=2, expert_tensor=1), {}, id="tp2-etp1-topk", marks=pytest.mark.slow),
        pytest.param(TOPK, layout(tensor=2, experts=2, expert_tensor=1), {}, id="tp2-ep2-etp1-topk"),
        pytest.param(
            MODEL,
            layout(tensor=2, sequence=True, experts=2, expert_tensor=1),
            {"data_parallel": 2},
            id="tp2-sp-ep2-etp1-dp2",
        ),
        pytest.param(MODEL, layout(tensor=2, experts=2), {"data_parallel": 2}, id="tp2-ep2-etp2"),
        pytest.param(TOPK, layout(tensor=2, sequence=True, experts=2), {"data_parallel": 2}, id="tp2-sp-ep2-etp2-topk"),
        pytest.param(
            TOPK, layout(pipeline=2, experts=2), {"data_parallel": 2, "distributed": True}, id="pp2-ep2-topk-zero1"
        ),
    ],
)
def test_trains_like_one_process(config: ParrotConfig, parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    assert_same(train(config, parallel, **settings), one_process(config))


def test_the_experts_bias_is_among_what_layouts_agree_on() -> None:
    """Moved by the counts of three steps, by the same amount each."""
    moved = next(value for name, value in one_process(TOPK).parameters.items() if is_expert_bias(name))
    assert set(abs(moved / TOPK.moe.bias_update_rate).round(4).tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert abs(moved).max() > 0


@pytest.mark.parametrize(
    ("config", "settings", "data_parallel"),
    [
        # A rank with one micro-batch leaves the auxiliary losses to the MoE itself.
        pytest.param(TOPK, {"num_batches": 1}, 1, id="one-micro-batch"),
        pytest.param(TOPK, {"num_batches": 2}, 2, id="one-micro-batch-a-rank"),
        pytest.param(MODEL, {"reduction": "micro_batch"}, 1, id="micro-batch-means"),
    ],
)
def test_context_parallel_steps_like_one_process(
    config: ParrotConfig, settings: dict[str, Any], data_parallel: int
) -> None:
    run = train(config, layout(context=2), data_parallel=data_parallel, **settings)
    assert_same(run, train(config, **settings))


def test_frozen_stages_without_optimizer() -> None:
    frozen = tuple(name for name, learns in STAGE_1.items() if not learns)
    run = train(MODEL, layout(pipeline=2), trainable=STAGE_1)
    assert set(run.gradients) == {name for name in run.gradients if "mm_projector" in name}
    assert_same(run, one_process(MODEL, frozen))


def test_frozen_experts_are_shared_all_the_same() -> None:
    trainable = {"vision": False, "projector": True, "moe": False, "llm": False}
    frozen = tuple(name for name, learns in trainable.items() if not learns)
    run = train(TOPK, layout(experts=2), data_parallel=2, trainable=trainable)
    assert_same(run, one_process(TOPK, frozen))


@pytest.mark.parametrize(
    ("parallel", "settings"),
    [
        pytest.param(layout(tensor=2), {}, id="tp2"),
        pytest.param(
            layout(tensor=2, sequence=True), {"recompute": "full"}, id="tp2-sp-recompute", marks=pytest.mark.slow
        ),
        pytest.param(layout(pipeline=2, chunks=2, tensor=2, sequence=True), {}, id="tp2-sp-pp2-vpp2"),
        pytest.param(layout(context=2), {"data_parallel": 2, "distributed": True}, id="cp2-dp2-zero1"),
    ],
)
def test_lora_alone_learns_like_in_one_process(parallel: ParallelConfig, settings: dict[str, Any]) -> None:
    run = train(LORA, parallel, trainable=dict.fromkeys(ALL, False), **settings)
    reference = one_process(LORA, tuple(ALL))
    assert reference.gradients
    assert all(is_lora(name) for name in reference.gradients)
    assert_same(run, reference)


def test_lora_and_everything_else_learn_like_in_one_process() -> None:
    assert_same(train(LORA, layout(tensor=2, sequence=True)), one_process(LORA))


def test_adam_on_pipeline_stages() -> None:
    run, reference = train(MODEL, layout(pipeline=2), sgd=False), one_process(MODEL, sgd=False)
    assert run.losses == pytest.approx(reference.losses, rel=1e-5)
