"""Next tokens of a batch against a plain function for one request, and against transformers where it has the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parrot_sys.engine.sampler import (
    RequestSampler,
    SamplingParams,
    filter_logits,
    next_tokens,
    penalize,
    token_logprobs,
)
from parrot_sys.errors import ConfigError

VOCAB = 23
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1e-37, 0.3, 1.0, 7.0, 1e30]),
    top_k=st.sampled_from([0, 1, 4, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.8, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.4]),
    seed=st.integers(0, 5),
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


def changed_logits(logits: Tensor, params: SamplingParams, prompt: list[int], answer: list[int]) -> Tensor:
    """Penalties of one request, token by token."""
    logits = logits.clone()
    for token in set(prompt) | set(answer) if params.repetition_penalty != 1 else ():
        logits[token] *= params.repetition_penalty if logits[token] <= 0 else 1
        logits[token] /= params.repetition_penalty if logits[token] > 0 else 1
    for token, count in Counter(answer).items():
        logits[token] -= params.frequency_penalty * count
        logits[token] -= params.presence_penalty
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """Tokens that may be drawn and their weights, from a list that gets shorter."""
    scaled = ((logits - logits.max()).double() / params.temperature).tolist()
    left = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if params.top_k:
        left = [token for token in left if scaled[token] >= scaled[left[min(params.top_k, VOCAB) - 1]]]
    weights = torch.tensor([scaled[token] for token in left]).softmax(0).tolist()
    kept, total = [], 0.0
    for token, weight in zip(left, weights, strict=True):
        if params.top_p < 1 and kept and total >= params.top_p - 1e-6:
            break
        kept.append(token)
        total += weight
    kept = [token for token, weight in zip(kept, weights, strict=False) if weight >= params.min_p * weights[0]]
    return {token: scaled[token] for token in kept}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(PARAMS, TOKENS, TOKENS), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_batch_chooses_what_each_request_chooses_alone(requests: Any, seed: int) -> None:
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3

    def sampler(params: SamplingParams, prompt: list[int], answer: list[int]) -> RequestSampler:
        own = RequestSampler(params, [*prompt, -200], VOCAB)
        for token in answer:
            own.note(token)
        return own

    tokens = next_tokens(logits, [sampler(*request) for request in requests])
    for row, (params, prompt, answer) in enumerate(requests):
        assert tokens[row] == next_tokens(logits[row : row + 1], [sampler(params, prompt, answer)])[0]
        wanted = changed_logits(logits[row], params, prompt, answer)
        if not params.temperature:
            assert wanted[tokens[row]] >= wanted.max() - 1e-5
            continue
        allowed = candidates(wanted, params)
        assert int(tokens[row]) in allowed
        filtered = torch.full((1, VOCAB), -torch.inf)
        filtered[0, list(allowed)] = torch.tensor(list(allowed.values()), dtype=torch.float32)
        alone = torch.multinomial(filtered.softmax(-1), 1, generator=torch.Generator().manual_seed(params.seed or 0))
        assert tokens[row] == alone.item()


@settings(max_examples=40, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(0, 1000), TOKENS)
def test_equals_the_processors_of_transformers(params: list[SamplingParams], seed: int, prompt: list[int]) -> None:
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed))
    for row, own in enumerate(params):
        plain = SamplingParams(repetition_penalty=own.repetition_penalty)
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(own.repetition_penalty)])
        wanted = processors(torch.tensor([prompt], dtype=torch.int64), logits[row : row + 1].clone())
        ours = logits[row : row + 1]
        if plain.penalizes:
            ours = penalize(ours, [RequestSampler(plain, prompt, VOCAB)])
        torch.testing.assert_close(ours, wanted)
        if not 1e-3 < own.temperature < 100:
            continue
        warpers: list[Any] = [TemperatureLogitsWarper(own.temperature)]
        if own.top_k:
            warpers.append(TopKLogitsWarper(own.top_k))
        if own.top_p < 1:
            warpers.append(TopPLogitsWarper(own.top_p))
        warpers.append(MinPLogitsWarper(own.min_p))
        expected = LogitsProcessorList(warpers)(torch.zeros(1, 0, dtype=torch.int64), wanted)
        actual = filter_logits(ours / own.temperature, [own])
        torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1))


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0) | st.floats(1e-37, 1e37),
        top_k=st.integers(0, 13),
        top_p=st.floats(1e-9, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(1e-37, 1e37),
        presence_penalty=st.floats(-1e38, 1e38),
        frequency_penalty=st.floats(-1e38, 1e38),
        seed=st.just(0),
    ),
    seen=st.booleans(),
)
def test_some_token_is_chosen_whatever_the_settings(logits: list[float], params: SamplingParams, seen: bool) -> None:
    """No temperature and no penalty makes numbers of which none is the largest."""
    sampler = RequestSampler(params, range(len(logits)) if seen else [], len(logits))
    for _ in range(3 * seen):
        sampler.note(0)
    token = int(next_tokens(torch.tensor([logits]), [sampler]))
    if params.temperature < 1e-6 and not seen:
        assert logits[token] == max(logits)
    else:
        assert 0 <= token < len(logits)


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    sampler = RequestSampler(SamplingParams(temperature=1.0, seed=1), [], 3)
    drawn = torch.cat([next_tokens(probs.log()[None], [sampler]) for _ in range(4000)])
    torch.testing.assert_close(drawn.bincount(minlength=3) / 4000, probs, atol=0.03, rtol=0)


def test_a_request_without_a_seed_takes_one_from_torch() -> None:
    def draw() -> list[int]:
        samplers = [RequestSampler(SamplingParams(temperature=9.0), [], VOCAB) for _ in range(8)]
        return next_tokens(torch.zeros(8, VOCAB), samplers).tolist()

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert draw() == first
    assert draw() != first


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(0, 30)), min_size=1, max_size=5))
def test_logprobs(seed: int, asked: list[tuple[int, int]]) -> None:
    logits = torch.randn(len(asked), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    tokens, top = [token for token, _ in asked], [count for _, count in asked]
    for row, found in enumerate(token_logprobs(logits, tokens, top)):
        exact = logits[row].double().log_softmax(-1)
        assert (found.token, len(found.top)) == (tokens[row], min(top[row], VOCAB))
        assert found.logprob == pytest.approx(float(exact[tokens[row]]), abs=1e-5)
        assert found.is_greedy == (tokens[row] == int(logits[row].argmax()))
        assert [token for token, _ in found.top] == exact.argsort(descending=True)[: top[row]].tolist()
        for token, value in found.top:
            assert value == pytest.approx(float(exact[token]), abs=1e-5)
        assert found == token_logprobs(logits[row : row + 1], [tokens[row]], [top[row]])[0]
    assert token_logprobs(logits[:0], [], []) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be > 0 .*, or 0 .* got -0\.1"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"temperature": 1e-60}, "temperature must be > 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a finite"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**setting)
