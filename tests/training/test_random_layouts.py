"""Layouts that nobody chose: drawn at random, every valid one trains like one process, for every system."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import ParallelConfig
from parrot_sys.systems.config import ParrotConfig
from tests.training.layouts import (
    FLAMINGO,
    LLAMA,
    LORA,
    MODEL,
    QWEN3,
    TIED,
    TOPK,
    WINGS,
    Run,
    assert_same,
    layout,
    train,
)

SYSTEMS = {
    "dense": MODEL,
    "top-k": TOPK,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "tied": TIED,
    "lora": LORA,
    "wings": WINGS,
    "flamingo": FLAMINGO,
}
MAX_PROCESSES = 8


@functools.cache
def _one_process(config: ParrotConfig) -> Run:
    return train(config)


@st.composite
def _layouts(draw: st.DrawFn, experts: bool) -> tuple[ParallelConfig, dict[str, Any]]:
    """A layout that the configuration takes, of at most eight processes and more than one, and further settings."""
    size = st.sampled_from((1, 2, 4))
    sizes = st.tuples(st.sampled_from((1, 2)), size, size, size)  # the toy's two query groups have no more ranks
    tensor, pipeline, context, copies = draw(sizes.filter(lambda drawn: 1 < math.prod(drawn) <= MAX_PROCESSES))
    chunks = draw(st.sampled_from((None, 2))) if pipeline == 2 else None
    sequence = tensor > 1 and draw(st.booleans())
    shared = draw(st.sampled_from((1, 2, 4))) if experts else 1
    expert_tensor = draw(st.sampled_from((None, 1, 2))) if experts else None
    try:
        parallel = layout(tensor, pipeline, chunks, context, sequence, shared, expert_tensor)
        parallel.data_parallel_size(parallel.model_parallel_size * copies)
    except ConfigError:
        reject()
    further = {
        "data_parallel": copies,
        "distributed": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "recompute": draw(st.sampled_from(("none", "full"))),
    }
    return parallel, further


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_layout_drawn_at_random_trains_like_one_process(system: str) -> None:
    config = SYSTEMS[system]

    @given(_layouts(config.moe.num_experts > 0))
    # Shrinking would train hundreds of times; the layout that fails is printed. Many draws are no valid layout.
    @settings(
        max_examples=5,
        deadline=None,
        phases=[Phase.generate],
        print_blob=True,
        suppress_health_check=[HealthCheck.filter_too_much],
    )
    def walk(drawn: tuple[ParallelConfig, dict[str, Any]]) -> None:
        parallel, further = drawn
        assert_same(train(config, parallel, **further), _one_process(config))

    walk()
