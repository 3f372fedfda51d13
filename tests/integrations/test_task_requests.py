"""Generation settings as the tasks of lm-eval 0.4.13 and lmms-eval 0.7.3 have them, and what the engine is asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.errors import ConfigError
from parrot_sys.integrations.task_requests import (
    new_tokens,
    requests_together,
    sampling_params,
)
from tests.integrations.task_settings import GREEDY, OF_TASKS, REFUSED, drawn, request


@pytest.mark.parametrize(("settings", "expected"), OF_TASKS, ids=lambda own: str(own) if isinstance(own, dict) else "")
def test_settings_of_tasks_are_taken(settings: dict[str, Any], expected: SamplingParams) -> None:
    assert request(settings).sampling == expected


@pytest.mark.parametrize("settings", REFUSED, ids=lambda own: next(iter(own)))
def test_what_the_engine_does_not_do_is_refused_with_the_reason(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"{name}={value} not supported.*most likely token"):
        request(settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, drawn(1.0)),
        ({"do_sample": True, "temperature": 0}, GREEDY),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None}, drawn(1.0)),
        ({"do_sample": True, "top_k": -1.0}, drawn(1.0, top_k=0)),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, drawn(1.0, top_k=0, min_p=0.1)),
        ({"do_sample": False, "top_k": -1, "top_p": 2, "min_p": 7, "use_cache": True}, GREEDY),
        ({"use_cache": False, "num_return_sequences": 1, "early_stopping": False}, GREEDY),
        (
            {"repetition_penalty": 1.2, "presence_penalty": 0.5},
            SamplingParams(repetition_penalty=1.2, presence_penalty=0.5),
        ),
    ],
)
def test_settings_of_users_are_taken(settings: dict[str, Any], expected: SamplingParams) -> None:
    assert request(settings).sampling == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"do_sample": True, "top_k": -2}, "top_k"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": "no"}, "do_sample must be true or false, got 'no'"),
    ],
)
def test_values_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        request(settings)


NUMBERS = st.none() | st.sampled_from([0, 0.0, 0.3, 1, 1.0])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "do_sample": st.none() | st.booleans(),
            "temperature": NUMBERS,
            "top_p": NUMBERS,
            "min_p": NUMBERS,
            "top_k": st.none() | st.integers(-1, 60),
        },
    )
)
def test_no_setting_of_tasks_ends_in_an_error_and_greedy_is_greedy(settings: dict[str, Any]) -> None:
    found = sampling_params(settings)
    temperature, do_sample = settings.get("temperature"), settings.get("do_sample")
    draws = bool(temperature) if do_sample is None else do_sample and temperature != 0
    assert (found.temperature > 0) == bool(draws and settings.get("top_p") != 0)
    if not found.temperature:
        assert found == GREEDY


def test_stop_strings_come_under_both_names() -> None:
    assert request({"until": None}).stop_strings == ()
    assert request({"until": "a"}).stop_strings == ("a",)
    assert request({"until": ["a", "", None], "stop_sequences": ["\n", "a"]}).stop_strings == ("a", "\n")


def test_the_longest_answer_has_four_names() -> None:
    assert new_tokens({"until": []}, 7) == 7
    assert new_tokens({"max_completion_tokens": 3, "max_tokens": 2.0}, 7) == 2
    assert new_tokens({"max_new_tokens": 5, "max_gen_toks": None, "max_tokens": 2}, 7) == 5
    assert request({"max_tokens": 2, "max_completion_tokens": 3, "max_gen_toks": 1}).sampling == GREEDY
    with pytest.raises(ConfigError, match="max_new_tokens must be a number, got 'many'"):
        new_tokens({"max_new_tokens": "many"}, 7)


def test_requests_together() -> None:
    assert [requests_together(own, 8) for own in (None, "auto", "auto:4", 3, "3")] == [8, 8, 8, 3, 3]
    for own in (0, -1, "0", "some", "2.5"):
        with pytest.raises(ConfigError, match=f"batch_size must be >= 1 or auto, got {own}"):
            requests_together(own, 8)
