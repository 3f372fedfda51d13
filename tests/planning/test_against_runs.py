"""Predicted bytes against those of real training steps: small models, real processes, shapes the formulas never saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from parrot_sys.planning.communication import micro_batch_messages, step_messages
from parrot_sys.planning.memory import activation_bytes, state_bytes
from parrot_sys.planning.weights import stage_weights
from parrot_sys.systems.base import OTHERS
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.layout import Layout
from parrot_sys.systems.registry import system_of
from tests.planning.runs import Case, even_experts, make_batch, run, sizes
from tests.planning.shapes import SHAPES, SYSTEMS

ALL = {"vision": True}
PROJECTOR = {"projector": True, "others": False}
# One line a layout.
CASES = {
    "one process": Case(),
    "bf16": Case(precision="bf16"),
    "recompute": Case(layout=Layout(recompute=True)),
    "projector alone": Case(trainable=PROJECTOR),
    "everything learns": Case(trainable=ALL),
    "TP2": Case(layout=Layout(tensor=2)),
    "TP2+SP": Case(layout=Layout(tensor=2, sequence=True)),
    "TP2+SP, recompute, bf16": Case(layout=Layout(tensor=2, sequence=True, recompute=True), precision="bf16"),
    "TP2, everything learns": Case(layout=Layout(tensor=2), trainable=ALL),
    "PP2": Case(layout=Layout(pipeline=2), micro_batches=3),
    "PP2, VPP2": Case(layout=Layout(pipeline=2, virtual=2), micro_batches=4),
    "PP2, recompute": Case(layout=Layout(pipeline=2, recompute=True), micro_batches=3),
    "CP2": Case(layout=Layout(context=2)),
    "CP2, ZeRO-1, recompute, bf16": Case(
        layout=Layout(context=2, distributed_optimizer=True, recompute=True), precision="bf16"
    ),
    "DP2": Case(layout=Layout(data=2)),
    "DP2, ZeRO-1": Case(layout=Layout(data=2, distributed_optimizer=True)),
    "DP2, ZeRO-1, bf16": Case(layout=Layout(data=2, distributed_optimizer=True), precision="bf16"),
    # Dense experts or top-k, as the shape has them.
    "EP2": Case(layout=Layout(data=2, expert=2)),
    "EP2, ZeRO-1, bf16": Case(layout=Layout(data=2, expert=2, distributed_optimizer=True), precision="bf16"),
    "EP2, projector alone": Case(layout=Layout(data=2, expert=2), trainable=PROJECTOR),
    "ETP2": Case(layout=Layout(data=2, expert_tensor=2)),
    "TP2, ETP2": Case(layout=Layout(tensor=2, expert_tensor=2)),
    "TP2+SP, EP2": Case(layout=Layout(tensor=2, sequence=True, expert=2)),
    "PP2, EP2": Case(layout=Layout(pipeline=2, data=2, expert=2), micro_batches=3),
}
UPDATES = {"lora": True, "others": False}
FROZEN_DECODER = {"llm": False}
# What a system's parts and the updates do with the gradients.
PARTLY = {
    "updates alone": Case(trainable=UPDATES),
    "updates alone, recompute": Case(layout=Layout(recompute=True), trainable=UPDATES),
    "updates alone, TP2": Case(layout=Layout(tensor=2), trainable=UPDATES),
    "updates alone, TP2+SP": Case(layout=Layout(tensor=2, sequence=True), trainable=UPDATES),
    "updates alone, PP2": Case(layout=Layout(pipeline=2), trainable=UPDATES, micro_batches=3),
    "frozen decoder": Case(trainable=FROZEN_DECODER),
    "frozen decoder, TP2, recompute": Case(layout=Layout(tensor=2, recompute=True), trainable=FROZEN_DECODER),
    "frozen decoder, TP2+SP, recompute": Case(
        layout=Layout(tensor=2, sequence=True, recompute=True), trainable=FROZEN_DECODER
    ),
    "frozen decoder, PP2, bf16": Case(
        layout=Layout(pipeline=2), trainable=FROZEN_DECODER, micro_batches=3, precision="bf16"
    ),
}
# First stages of training, which pass parts by.
ALIGN = {"projector": True, "visual_learners": True, "others": False}
FIRST_STAGES = {
    "first stage": Case(trainable=ALIGN),
    "first stage, recompute, bf16": Case(layout=Layout(recompute=True), trainable=ALIGN, precision="bf16"),
    "first stage, TP2": Case(layout=Layout(tensor=2), trainable=ALIGN),
    "first stage, TP2+SP": Case(layout=Layout(tensor=2, sequence=True), trainable=ALIGN),
    "first stage, PP2": Case(layout=Layout(pipeline=2), trainable=ALIGN, micro_batches=3),
}
# Mixes on four processes.
MIXES = {
    "EP4": Case(layout=Layout(data=4, expert=4)),
    "EP2, DP4, ZeRO-1": Case(layout=Layout(data=4, expert=2, distributed_optimizer=True)),
    "EP2, ETP2": Case(layout=Layout(data=4, expert=2, expert_tensor=2)),
    "TP2, DP2, EP4": Case(layout=Layout(tensor=2, data=2, expert=4)),
    "TP2+SP, DP2, EP2, ETP2": Case(layout=Layout(tensor=2, sequence=True, data=2, expert=2, expert_tensor=2)),
    "TP2, DP2": Case(layout=Layout(tensor=2, data=2)),
    "TP4, EP2": Case(layout=Layout(tensor=4, expert=2)),
    "CP2, DP2, EP2": Case(layout=Layout(context=2, data=2, expert=2)),
    "TP2, PP2, EP2": Case(layout=Layout(tensor=2, pipeline=2, expert=2), micro_batches=3),
}
# A layer's own experts: all tensor-parallel ranks or one of them share each.
TOKEN_ROUTED = {
    "TP2+SP, EP2": CASES["TP2+SP, EP2"],
    "TP2+SP, EP2, ETP2": Case(layout=Layout(tensor=2, sequence=True, data=2, expert=2, expert_tensor=2)),
    "TP2+SP, EP2, ETP2, recompute, ZeRO-1, bf16": Case(
        layout=Layout(
            tensor=2,
            sequence=True,
            data=2,
            expert=2,
            expert_tensor=2,
            recompute=True,
            distributed_optimizer=True,
        ),
        precision="bf16",
    ),
}
EVERY_SYSTEM = (
    "one process",
    "bf16",
    "recompute",
    "everything learns",
    "TP2",
    "TP2+SP",
    "TP2+SP, recompute, bf16",
    "PP2",
    "PP2, VPP2",
    "PP2, recompute",
    "CP2",
    "CP2, ZeRO-1, recompute, bf16",
    "DP2, ZeRO-1",
)
QUICK = {"Wings": "TP2+SP", "MultiModal-GPT": "PP2", "token-routed decoder, four dense experts": "TP2+SP, EP2"}
EXPERT_PARALLEL = ("EP2", "EP2, ZeRO-1, bf16", "PP2, EP2")
# Labels, metrics and norms: counts that no formula follows (about 600 bytes, more with more experts).
SMALL_MESSAGES = 1500


# Seen with every shape in each run of the tests; of the other layouts each with one shape, the rest are slow.
EVERY_SHAPE = ("one process", "TP2+SP", "PP2", "EP2", "ETP2", "TP2+SP, EP2")


def _pairs() -> Iterator[Any]:
    for row, (name, case) in enumerate(CASES.items()):
        # `parrot plan` refuses a trainable EfficientNet.
        fit = [
            s for s, c in SHAPES.items() if not (case.trainable.get("vision") and c.vision.type == "efficientnet_lite0")
        ]
        for column, shape in enumerate(fit):
            quick = name in EVERY_SHAPE or column == row % len(fit)
            yield pytest.param(shape, name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("shape", "name"), list(_pairs()))
def test_bytes_are_those_of_a_real_step(shape: str, name: str) -> None:
    _compare(SHAPES[shape], CASES[name], samples=6)


def _systems() -> Iterator[Any]:
    """Each system with each layout; in each run of the tests one process, and what QUICK names; the rest are slow."""
    for shape, config in SYSTEMS.items():
        cases = {name: CASES[name] for name in EVERY_SYSTEM}
        if config.lora is not None:
            cases |= PARTLY
        if config.llm.experts is not None:
            cases = {name: CASES[name] for name in (*EVERY_SYSTEM, *EXPERT_PARALLEL) if name != "TP2"} | TOKEN_ROUTED
        parts = system_of(config).parts
        if bypass := tuple(name for name, part in parts.items() if part.may_be_bypassed):
            known = {name: ALIGN[name] for name in ALIGN if name in (*parts, OTHERS)}
            cases |= {name: replace(case, trainable=known, bypass=bypass) for name, case in FIRST_STAGES.items()}
        if config.llm.experts is not None:
            del cases["first stage, TP2"]
        for name, case in cases.items():
            quick = name in ("one process", QUICK.get(shape))
            yield pytest.param(shape, case, id=f"{shape}: {name}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("shape", "case"), list(_systems()))
def test_bytes_of_every_system_are_those_of_a_real_step(shape: str, case: Case) -> None:
    _compare(SYSTEMS[shape], case, samples=6 if case.layout.num_gpus < 4 else 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name"),
    # Four ranks can share the heads of one shape only.
    [(shape, name) for shape in SHAPES for name in MIXES if not name.startswith("TP4") or "EfficientNet" in shape],
)
def test_bytes_of_mixes_are_those_of_a_real_step(shape: str, name: str) -> None:
    _compare(SHAPES[shape], MIXES[name], samples=24)


def _compare(config: ParrotConfig, case: Case, *, samples: int) -> None:
    config = even_experts(config, case.layout.expert)
    batch = make_batch(config, samples=samples)
    job, layout, micro_batch = case.job(config), case.layout, sizes(batch)
    for stage, measured in run(config, case, batch).items():
        state = state_bytes(job, layout, stage_weights(job, layout, stage), stage)
        # Chunks of layers have buffers of their own, each with its padding.
        assert state[:2] == pytest.approx(
            (measured.parameters, measured.gradients), rel=0.01 if layout.virtual > 1 else 0
        )
        # Padding of the buffer is dealt too, by chance to the one rank or the other.
        assert state[2] == pytest.approx(measured.optimizer, rel=0.01)
        assert activation_bytes(job, layout, stage, micro_batch, case.micro_batches) == pytest.approx(
            measured.activations, rel=0.1
        )
        predicted: Counter[str] = Counter()
        messages = micro_batch_messages(job, layout, stage, micro_batch) * case.micro_batches
        for message in [*messages, *step_messages(job, layout, stage)]:
            predicted[message.operation] += message.payload
        sent = Counter(measured.messages)
        if layout.num_gpus > 1:
            assert 0 <= sent.pop("all_reduce") - predicted.pop("all_reduce", 0) < SMALL_MESSAGES
        assert sent == predicted


def test_samples_without_images_keep_nothing_for_the_experts() -> None:
    config, case = SHAPES["square CLIP, many heads, five dense experts"], Case()
    batch = make_batch(config, samples=6, images=0)
    (measured,) = run(config, case, batch).values()
    assert activation_bytes(case.job(config), case.layout, 0, sizes(batch)) == pytest.approx(
        measured.activations, rel=0.1
    )
