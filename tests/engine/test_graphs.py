"""Steps as they are recorded in CUDA graphs, without a GPU: equal answers, and nothing that a graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import parrot_sys
from parrot_sys.engine.graphs import LADDER, DecodeGraphs, StaticStep
from parrot_sys.megatron.attention.paged import PagedCache
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.engine.schedules import SCHEDULES, Schedule, Served

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    model, _ = parrot_sys.load_pretrained(FIXTURES / "parrot_tiny" / "model")
    side = model.config.vision.image_size
    yield Served(model, torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1)))
    shutdown()


class Recorded:
    """A replay that can only be what a graph would do: the same calls on the same tensors."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        output = step()

        def replay() -> Tensor:
            self.replays += 1
            return output.copy_(step())

        return replay


@settings(max_examples=12, deadline=None)
@given(schedule=SCHEDULES)
def test_any_schedule_gives_the_tokens_of_single_requests(served: Served, schedule: Schedule) -> None:
    served.model.lockstep.capture = Recorded()
    try:
        schedule.run(served)
    finally:
        served.model.lockstep.capture = None


def test_rows_that_fill_up_a_batch_write_into_no_block_of_a_request(served: Served) -> None:
    """An answer ends and its block goes to another request, while its place in the batch stays."""
    served.model.lockstep.capture = Recorded()
    requests = [(0, 7, 0, None), (0, 2, 0, None), (0, 2, 0, None), (0, 1, 0, None)]
    try:
        Schedule(requests=requests, block_size=1, spare_blocks=0, rows=1, running=4).run(served)
    finally:
        served.model.lockstep.capture = None


def test_answers_go_through_recorded_steps_and_batches_are_filled_up(served: Served) -> None:
    recorded = served.model.lockstep.capture = Recorded()
    try:
        Schedule(
            requests=[(0, 6, 0, None), (1, 5, 0, None), (4, 6, 0, None)],
            block_size=4,
            spare_blocks=99,
            rows=99,
            running=4,
        ).run(served)
    finally:
        served.model.lockstep.capture = None
    assert recorded.replays == 5  # all steps but the one that reads the prompts


@torch.inference_mode()
def test_a_step_asks_the_device_for_nothing() -> None:
    """On the meta device whatever would wait for a GPU raises: no tensor there has a value."""
    loaded, _ = parrot_sys.load_pretrained(FIXTURES / "parrot_tiny" / "model")
    model = loaded.model.to("meta")
    assert DecodeGraphs.supports(model)
    for size in LADDER:
        step = StaticStep(model, PagedCache(9, 16, device="meta"), size, table_width=4)
        address, logits = step.numbers, step.run()
        assert logits.shape == (size, model.bridge.llm.vocab_size)
        assert step.numbers is address
    with pytest.raises(RuntimeError, match="meta"):
        bool(logits.any())


def test_systems_whose_steps_differ_are_not_recorded() -> None:
    model, _ = parrot_sys.load_pretrained(FIXTURES / "wings_tiny" / "model", compat="paper")
    assert not DecodeGraphs.supports(model.model)
