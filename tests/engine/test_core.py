"""The engine on real models: under any schedule each request gets the tokens of a plain loop over `forward`.

Schedules differ in sizes of blocks and steps, arrivals, cancellations, preemptions and shared prefixes; requests in
pictures (none, one, two), prompts about the same picture, and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parrot_sys
from parrot_sys.data.packing import Sample
from parrot_sys.engine.config import AdmissionLimits, EngineConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest
from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.engine.schedules import (
    NEW_TOKENS,
    PROMPTS,
    SCHEDULES,
    Schedule,
    Served,
    forgetting,
    schedules_until_found,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
SYSTEMS = ("parrot", "wings-paper", "multimodal-gpt", "multimodal-gpt-paper")


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    source, flamingo = FIXTURES / "mmgpt_tiny", tmp_path_factory.mktemp("mmgpt") / "model"
    parts: dict[str, Any] = {
        "llm": source / "llama",
        "flamingo": source / "open_flamingo.pt",
        "lora": source / "mmgpt-lora.pt",
        "vision": source / "clip-vit-tiny",
    }
    convert(ConvertConfig(source_format="multimodal_gpt", output=flamingo, **parts))
    found = {}
    for name, path, options in (
        ("parrot", FIXTURES / "parrot_tiny" / "model", {}),
        ("wings-paper", FIXTURES / "wings_tiny" / "model", {"compat": "paper"}),
        ("wings-released", FIXTURES / "wings_tiny" / "model", {"compat": "released"}),
        ("multimodal-gpt", flamingo, {}),
        ("multimodal-gpt-paper", flamingo, {"compat": "paper"}),
    ):
        model, _ = parrot_sys.load_pretrained(path, **options)
        side = model.config.vision.image_size
        pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
        found[name] = Served(model, pixels)
    return found


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=6, deadline=None)
@given(schedule=SCHEDULES)
def test_any_schedule_gives_the_tokens_of_single_requests(
    served: dict[str, Served], system: str, schedule: Schedule
) -> None:
    schedule.run(served[system])


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=SCHEDULES)
def test_a_long_walk_over_schedules(served: dict[str, Served], system: str, schedule: Schedule) -> None:
    schedule.run(served[system])


@pytest.mark.parametrize(("system", "use_cache"), [("wings-released", True), ("parrot", False), ("wings-paper", False)])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_whole_requests_where_nothing_can_be_kept(
    served: dict[str, Served], system: str, use_cache: bool, data: st.DataObject
) -> None:
    schedule = data.draw(SCHEDULES)
    if system == "wings-released":  # which knows one picture a request
        single = [own for own in schedule.requests if sum(i < 0 for i in PROMPTS[own[0]].ids) <= 1]
        schedule = Schedule(**{**vars(schedule), "requests": single})
    schedule.run(served[system], use_cache=use_cache)


@pytest.mark.parametrize(("left_out", "other"), [("guidance", 1), ("image", 2)])
def test_blocks_that_do_not_know_their_pictures_are_found_out(
    served: dict[str, Served], left_out: str, other: int
) -> None:
    """Without what a picture is and what guided it, requests would get the rows of another one."""
    schedule = Schedule(
        requests=[(0, 6, 0, None), (other, 6, 1, None)], block_size=4, spare_blocks=99, rows=99, running=4
    )
    schedule.run(served["parrot"])
    with forgetting(left_out), pytest.raises(AssertionError, match=f"prompt {other}"):
        schedule.run(served["parrot"])


@pytest.mark.parametrize(("system", "left_out"), [("parrot", "guidance"), ("multimodal-gpt", "image")])
def test_random_schedules_find_a_hash_that_knows_too_little(
    served: dict[str, Served], system: str, left_out: str
) -> None:
    found = schedules_until_found(served[system], left_out, 60)
    assert found is not None
    assert served[system].preempted_with_pictures > 0


def test_more_pictures_than_the_system_reads_are_refused(served: dict[str, Served]) -> None:
    """Before the request runs together with others; prompt 3 has two."""
    own = served["wings-released"]
    engine = Engine(own.model.lockstep, EngineConfig())
    with pytest.raises(DataError, match="must be <= 1 for this model, got 2"):
        engine.submit(EngineRequest(sample=own.sample(3), max_new_tokens=2))
    assert not engine.has_requests


def test_prefixes_pictures_and_preemption_are_met(served: dict[str, Served]) -> None:
    """What the schedules are for: a second question about a picture takes its rows, and runs no tower."""
    one = Schedule(
        requests=[(0, 6, 0, None), (0, 6, 2, None), (1, 6, 4, None)], block_size=4, spare_blocks=99, rows=99, running=4
    )
    engine = one.run(served["parrot"])
    assert engine.pool.hits > 0
    assert engine.cache.pictures_encoded == 1
    assert engine.cache.routed.counts.misses == 2  # two prompts ask about it
    tight = Schedule(
        requests=[(7, 6, 0, None), (7, 6, 0, None), (6, 6, 0, None)], block_size=1, spare_blocks=4, rows=99, running=4
    )
    engine = tight.run(served["parrot"])
    assert engine.scheduler.num_preemptions > 0


def test_continuations_share_their_prompt_in_one_pass(served: dict[str, Served]) -> None:
    own = served["parrot"]
    engine = Engine(own.model.lockstep, EngineConfig(num_blocks=64, block_size=4))
    wanted, values = own.answer(0)
    options = [wanted[:3], [9, 8, 7, 6], wanted[:1]]
    for option in options:
        engine.submit(EngineRequest(sample=own.sample(0), max_new_tokens=0, given=tuple(option)))
    deltas = {delta.number: delta for delta in engine.step()}
    assert not engine.has_requests
    for number, count in ((0, 3), (2, 1)):
        assert [token.logprob for token in deltas[number].scored] == pytest.approx(values[:count], abs=1e-4)
        assert all(token.is_greedy for token in deltas[number].scored)
    assert [token.token for token in deltas[1].scored] == options[1]
    assert not all(token.is_greedy for token in deltas[1].scored)


def test_echo_scores_the_prompt_and_goes_on(served: dict[str, Served]) -> None:
    own = served["parrot"]
    sample = own.sample(4)
    request = EngineRequest(sample=sample, max_new_tokens=2, prompt_logprobs=2, logprobs=1)
    engine = Engine(own.model.lockstep, EngineConfig(num_blocks=64, block_size=4))
    engine.submit(request)
    deltas = engine.step() + engine.step()
    with torch.no_grad():
        exact = own.model(torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
    rows = range(1, len(sample.input_ids))
    found = deltas[0].scored
    assert [token.token for token in found] == sample.input_ids[1:]
    assert [token.logprob for token in found] == pytest.approx(
        [float(exact[row - 1, sample.input_ids[row]]) for row in rows], abs=1e-4
    )
    assert all(len(token.top) == 2 for token in found)
    assert [token for delta in deltas for token in delta.tokens] == own.answer(4)[0][:2]
    assert deltas[1].finish_reason == "length"
    assert deltas[1].scored == ()


class Words:
    """A tokenizer with a word for each id."""

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return "".join(f" w{token}" for token in token_ids)


def test_stop_strings_ids_and_deadlines(served: dict[str, Served]) -> None:
    own = served["parrot"]
    wanted = own.answer(0)[0]
    now = [0.0]
    engine = Engine(own.model.lockstep, EngineConfig(), tokenizer=Words(), clock=lambda: now[0])
    sample, words = own.sample(0), Words()
    stops = {
        engine.submit(EngineRequest(sample=sample, max_new_tokens=6, **options)): options
        for options in (
            {"stop_strings": (words.decode(wanted[1:3]),)},
            {"stop_ids": frozenset([wanted[2]])},
            {"deadline": 2.5},
            {"sampling": SamplingParams(temperature=1.0, seed=1)},
        )
    }
    texts, tokens, reasons = dict.fromkeys(stops, ""), {own: [] for own in stops}, {}
    while engine.has_requests:
        now[0] += 1
        for delta in engine.step():
            texts[delta.number] += delta.text
            tokens[delta.number] += delta.tokens
            reasons[delta.number] = delta.finish_reason
    assert [reasons[number] for number in stops] == ["stop", "stop", "expired", "length"]
    first = wanted.index(wanted[2])
    assert texts[0] == words.decode(wanted[:1])
    assert tokens[1] == wanted[: first + 1]
    assert tokens[2] == wanted[:2]
    assert texts[3] == words.decode(tokens[3])


def test_a_prompt_alone_is_scored_to_its_last_token(served: dict[str, Served]) -> None:
    own = served["parrot"]
    scored = []
    for new_tokens in (0, 1):
        engine = Engine(own.model.lockstep, EngineConfig())
        engine.submit(EngineRequest(sample=own.sample(4), max_new_tokens=new_tokens, prompt_logprobs=1))
        scored.append([each for delta in engine.step() for each in delta.scored])
    assert [own.token for own in scored[0]] == list(PROMPTS[4].ids[1:])
    assert [own.logprob for own in scored[0]] == pytest.approx([own.logprob for own in scored[1]], abs=1e-5)


def test_a_repeated_question_that_rests_gets_its_answer(served: dict[str, Served]) -> None:
    """It comes back with the blocks of the first one in the place of its own, and no row runs but the next."""
    for pause in range(1, NEW_TOKENS):
        Schedule(
            requests=[(4, NEW_TOKENS, 0, None), (4, NEW_TOKENS, NEW_TOKENS + 1, None)],
            block_size=2, spare_blocks=30, rows=99, running=4, rests={NEW_TOKENS + 1 + pause: (1, 0)},
        ).run(served["parrot"])  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(rests=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=20), blocks=st.integers(15, 40))
def test_answers_that_rest_go_on_as_if_they_had_not(
    served: dict[str, Served], rests: list[tuple[int, int]], blocks: int
) -> None:
    own = served["parrot"]
    engine = Engine(own.model.lockstep, EngineConfig(num_blocks=blocks, block_size=4))
    numbers = [engine.submit(EngineRequest(sample=own.sample(k), max_new_tokens=NEW_TOKENS)) for k in range(6)]
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    ended: set[int] = set()
    resting: dict[int, int] = {}
    while len(ended) < len(numbers):
        for number in [number for number, left in resting.items() if not left]:
            engine.resume(number)
        resting = {number: left - 1 for number, left in resting.items() if left}
        if rests:
            number, length = rests.pop()
            engine.pause(number)
            resting[number] = length
        held = engine.pool.num_blocks - engine.pool.num_free
        assert held or not engine.scheduler.running
        for delta in engine.step():
            assert delta.number not in resting
            tokens[delta.number] += delta.tokens
            ended |= {delta.number} if delta.finish_reason else set()
    assert [tokens[number] for number in numbers] == [own.answer(k)[0] for k in range(6)]
    assert engine.pool.num_free == blocks


@pytest.mark.parametrize("feature_bytes", [0, 2**20])
def test_routes_are_told_even_where_the_cache_has_every_row(served: dict[str, Served], feature_bytes: int) -> None:
    """What the router attended to, times what it attended to, gives the logits that it decided by."""
    own = served["parrot"]
    config = EngineConfig(block_size=1, feature_bytes=feature_bytes, routed_bytes=feature_bytes)
    engine, model = Engine(own.model.lockstep, config), own.model.model
    for _ in range(2):
        number = engine.submit(EngineRequest(sample=own.sample(3), max_new_tokens=1, routes=True))
        images, words = engine.images(number), torch.tensor(engine.guidance_ids(number))
        while engine.has_requests:
            engine.step()
        moe = model.bridge.moe
        text = model.decoder.embed(words).detach()
        for image in images:
            logits = image.attention @ text @ moe.router_weight.detach().T
            torch.testing.assert_close(logits, image.route[0], rtol=1e-4, atol=1e-5)
    assert engine.pool.hits >= len(words)
    if feature_bytes:
        assert engine.cache.pictures_encoded == 2
    plain = served["multimodal-gpt"]
    engine = Engine(plain.model.lockstep, EngineConfig())
    number = engine.submit(EngineRequest(sample=plain.sample(0), max_new_tokens=1, routes=True))
    images = engine.images(number)
    engine.step()
    assert [(image.route, image.attention) for image in images] == [((), None)]


def test_requests_that_are_refused(served: dict[str, Served]) -> None:
    model = served["parrot"].model.lockstep
    with pytest.raises(ConfigError, match="max_new_tokens must be >= 1 where nothing is scored"):
        EngineRequest(sample=Sample(input_ids=[1]), max_new_tokens=0)
    engine = Engine(model, EngineConfig(num_blocks=2, block_size=4, limits=AdmissionLimits(max_prompt_rows=7)))
    with pytest.raises(DataError, match=r"at most 7 rows with its images \(max_prompt_rows\), got 8"):
        engine.submit(EngineRequest(sample=Sample(input_ids=[1] * 8), max_new_tokens=1))
    with pytest.raises(DataError, match="may come to have 13 rows, the cache holds 8"):
        engine.submit(EngineRequest(sample=Sample(input_ids=[1] * 4), max_new_tokens=9))
    with pytest.raises(ConfigError, match="stop strings need an engine with a tokenizer"):
        engine.submit(EngineRequest(sample=Sample(input_ids=[1]), max_new_tokens=1, stop_strings=("a",)))
    assert not engine.has_requests
