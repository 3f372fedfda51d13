"""A request gets what it would get alone: whatever stands beside it, however it is padded, in all systems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.inference.mixed_requests import Mixed, assert_alone, limited
from tests.megatron.tiled_models import write_tiled_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
MOST_PICTURES = {"parrot": 2, "wings-paper": 2, "wings-released": 1, "multimodal-gpt": 2, "llava": 2}
"""The released rule of Wings knows one picture a sample."""


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParrotForConditionalGeneration]:
    source, flamingo = FIXTURES / "mmgpt_tiny", tmp_path_factory.mktemp("mmgpt") / "model"
    parts: dict[str, Any] = {
        "llm": source / "llama",
        "flamingo": source / "open_flamingo.pt",
        "lora": source / "mmgpt-lora.pt",
        "vision": source / "clip-vit-tiny",
    }
    convert(ConvertConfig(source_format="multimodal_gpt", output=flamingo, **parts))
    return {
        "parrot": limited(FIXTURES / "parrot_tiny" / "model"),
        "wings-paper": limited(FIXTURES / "wings_tiny" / "model", compat="paper"),
        "wings-released": limited(FIXTURES / "wings_tiny" / "model", compat="released"),
        "multimodal-gpt": limited(flamingo),
        "llava": limited(write_tiled_model(tmp_path_factory.mktemp("llava") / "model")),
    }


def _compare_a_mix(model: ParrotForConditionalGeneration, system: str, data: st.DataObject) -> None:
    request = st.builds(
        Mixed,
        number=st.integers(0, 10**6),
        length=st.integers(1, 24),
        pictures=st.integers(0, MOST_PICTURES[system]),
        new_tokens=st.integers(1, 6),
        fills=st.booleans(),
    )
    requests = data.draw(st.lists(request, min_size=2, max_size=4))
    how = data.draw(
        st.fixed_dictionaries(
            {
                "left": st.booleans(),
                "sampled": st.booleans(),
                "use_cache": st.booleans(),
                "ends_every": st.sampled_from([0, 3]),
            }
        )
    )
    # `forward` of the released Wings gives what its public code gives in training, where padding is read as text.
    assert_alone(model, requests, rows=system != "wings-released", **how)


@pytest.mark.parametrize("system", MOST_PICTURES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_answers_do_not_depend_on_neighbours(
    systems: dict[str, ParrotForConditionalGeneration], system: str, data: st.DataObject
) -> None:
    _compare_a_mix(systems[system], system, data)


@pytest.mark.slow
@pytest.mark.parametrize("system", MOST_PICTURES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_long_walk_over_mixes(
    systems: dict[str, ParrotForConditionalGeneration], system: str, data: st.DataObject
) -> None:
    _compare_a_mix(systems[system], system, data)
