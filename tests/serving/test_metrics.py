"""What is measured of answers, with times that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from parrot_sys.engine.requests import Delta, FinishReason
from parrot_sys.serving.driver import Piece
from parrot_sys.serving.metrics import AnswerTimes, Metrics

ROWS = 7


@pytest.fixture
def metrics() -> Metrics:
    engine: Any = SimpleNamespace(
        scheduler=SimpleNamespace(running=[], waiting=[], num_paused=0, num_preemptions=0),
        pool=SimpleNamespace(num_free=1, num_blocks=1, queries=0, hits=0),
        config=SimpleNamespace(block_size=16),
        cache=SimpleNamespace(
            pictures_encoded=0,
            **dict.fromkeys(
                ("features", "routed"), SimpleNamespace(counts=SimpleNamespace(hits=0, misses=0), num_bytes=0)
            ),
        ),
        steps=0,
    )
    driver: Any = SimpleNamespace(engine=engine, is_dead=False)
    return Metrics(driver, "model", 100)


def answers(metrics: Metrics, start: float, *, choices: int = 1, **stream: float | None) -> list[AnswerTimes]:
    prompt: Any = SimpleNamespace(rows=ROWS, requests=[SimpleNamespace(max_new_tokens=5)] * choices)
    streams: list[Any] = [SimpleNamespace(**{"queued": start, "begun": None, **stream}) for _ in range(choices)]
    return metrics.answers(start, prompt, streams)


def piece(time: float, *tokens: int, reason: FinishReason | None = None, first: bool = False) -> Piece:
    return Piece(Delta(number=0, tokens=tokens, finish_reason=reason), time, first)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"vllm:{name}", {"model_name": "model", **labels})
    assert found is not None, name
    return found


def test_times_begin_with_the_request(metrics: Metrics) -> None:
    (own,) = answers(metrics, 100.0, queued=103.0, begun=104.0)
    own.take(piece(106.0, 1, first=True))
    own.take(piece(107.0, 2))
    own.take(piece(110.0, 3, reason="stop"))
    wanted = {"time_to_first_token": 6, "e2e_request_latency": 10, "inter_token_latency": 4}
    wanted |= {"request_queue_time": 1, "request_prefill_time": 2, "request_decode_time": 4}
    wanted |= {"request_inference_time": 6, "request_time_per_output_token": 2}
    for name, seconds in wanted.items():
        assert value(metrics, f"{name}_seconds_sum") == pytest.approx(seconds), name
    sizes = {"request_prompt_tokens": ROWS, "request_generation_tokens": 3, "request_params_max_tokens": 5}
    sizes |= {"request_max_num_generation_tokens": 3, "request_params_n": 1}
    for name, size in sizes.items():
        assert value(metrics, f"{name}_sum") == size, name
    assert value(metrics, "prompt_tokens_total") == ROWS
    assert value(metrics, "generation_tokens_total") == 3


@pytest.mark.parametrize(
    ("reason", "counted"),
    [("stop", "stop"), ("length", "length"), ("expired", "abort"), ("cancelled", "abort"), ("error", "error")],
)
def test_answers_are_counted_by_their_end(metrics: Metrics, reason: FinishReason, counted: str) -> None:
    names = ("stop", "length", "abort", "error")
    assert [value(metrics, "request_success_total", finished_reason=name) for name in names] == [0] * 4
    (own,) = answers(metrics, 0.0, begun=0.0)
    own.take(piece(1.0, 4, first=True))
    own.take(piece(2.0, reason=reason))
    own.end("cancelled")  # whoever asked leaves afterwards
    found = {name: value(metrics, "request_success_total", finished_reason=name) for name in names}
    assert found == {name: float(name == counted) for name in names}


def test_an_answer_without_a_token_has_no_first_one(metrics: Metrics) -> None:
    (own,) = answers(metrics, 0.0)
    own.take(piece(600.0, reason="expired"))
    assert value(metrics, "time_to_first_token_seconds_count") == 0
    assert value(metrics, "request_queue_time_seconds_count") == 0
    assert value(metrics, "prompt_tokens_total") == 0, "its prompt has not run"
    assert value(metrics, "e2e_request_latency_seconds_sum") == 600


def test_the_longest_of_several_answers(metrics: Metrics) -> None:
    one, other = answers(metrics, 0.0, choices=2, begun=0.0)
    one.take(piece(1.0, 1, first=True, reason="length"))
    assert value(metrics, "request_params_n_count") == 0, "the other goes on"
    other.take(piece(1.0, 1, first=True))
    other.take(piece(2.0, 2, reason="length"))
    assert value(metrics, "request_params_n_sum") == 2
    assert value(metrics, "request_max_num_generation_tokens_sum") == 2
    assert value(metrics, "request_prompt_tokens_sum") == 2 * ROWS
