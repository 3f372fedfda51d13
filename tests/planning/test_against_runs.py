"""Predicted bytes against those of real training steps: small models, real processes, shapes the formulas never saw."""

from __future__ import annotations

from collections import Counter

import pytest

from parrot_sys.planning.communication import micro_batch_messages, step_messages
from parrot_sys.planning.layouts import Layout
from parrot_sys.planning.memory import activation_bytes, state_bytes
from parrot_sys.planning.weights import stage_weights
from parrot_sys.training.config import TrainableConfig
from tests.planning.runs import SHAPES, Case, even_experts, make_batch, run, sizes

ALL = TrainableConfig(vision=True)
PROJECTOR = TrainableConfig(moe=False, llm=False)
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
# Labels, metrics and norms: counts that no formula follows (about 600 bytes, more with more experts).
SMALL_MESSAGES = 1500


# `parrot plan` refuses a trainable EfficientNet.
PAIRS = [
    (shape, name)
    for shape, config in SHAPES.items()
    for name, case in CASES.items()
    if not (case.trainable.vision and config.vision.type == "efficientnet_lite0")
]


@pytest.mark.parametrize(("shape", "name"), PAIRS)
def test_bytes_are_those_of_a_real_step(shape: str, name: str) -> None:
    case = CASES[name]
    config = even_experts(SHAPES[shape], case.layout.expert)
    batch = make_batch(config, samples=6)
    job, layout, micro_batch = case.job(config), case.layout, sizes(batch)
    for stage, measured in run(config, case, batch).items():
        state = state_bytes(job, layout, stage_weights(config, layout, stage), stage)
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
