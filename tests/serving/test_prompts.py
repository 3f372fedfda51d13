"""What a server that does nothing else would not take is refused for good, not told to come again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parrot_sys
from parrot_sys.data.tokenizer_files import MissingTokenizer
from parrot_sys.engine.config import AdmissionLimits, EngineConfig, SchedulerConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import EngineRequest, RequestImage, expand
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.errors import ApiError, as_api_error
from parrot_sys.serving.prompts import Preparer
from tests.support.serving import CHECKPOINT, picture, user

REFUSED = (400, 413)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    yield parrot_sys.load_pretrained(CHECKPOINT)
    shutdown()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.builds(
        EngineConfig,
        num_blocks=st.integers(1, 40),
        block_size=st.integers(1, 8),
        scheduler=st.builds(
            SchedulerConfig,
            max_rows_per_step=st.integers(6, 40),
            max_running=st.integers(1, 6),
            max_queue=st.integers(1, 6),
        ),
        limits=st.builds(AdmissionLimits, max_prompt_rows=st.none() | st.integers(1, 60)),
    ),
    max_choices=st.integers(1, 8),
    body=st.fixed_dictionaries(
        {"n": st.integers(1, 9), "max_tokens": st.none() | st.integers(1, 5) | st.sampled_from([60, 400, 10**12])}
    ),
    prompts=st.integers(0, 4),
    pictures=st.integers(0, 2),
)
def test_an_idle_engine_takes_a_request_or_it_is_refused_for_good(
    loaded: Any, sizes: EngineConfig, max_choices: int, body: dict[str, Any], prompts: int, pictures: int
) -> None:
    """`prompts` 0 asks for a conversation with pictures, and more of them for that many texts."""
    model, processor = loaded
    config = ServeConfig(checkpoint=CHECKPOINT, engine=sizes, max_choices=max_choices)
    preparer = Preparer(model, processor, config)
    asked = (
        {"messages": [user("What?", *map(picture, range(pictures)))]} if not prompts else {"prompt": ["a"] * prompts}
    )
    prepare = preparer.completion if prompts else preparer.chat
    engine = Engine(model.lockstep, sizes, tokenizer=processor.tokenizer)
    try:
        made = prepare(json.dumps({**body, **asked}).encode())[1]
        requests = [own for prompt in made for own in prompt.requests]
        numbers = {engine.submit(own) for own in requests}
    except (ApiError, DataError) as error:
        refused = as_api_error(error)
    else:
        refused = None
    if refused is not None:
        assert refused.status in REFUSED
        return
    assert len(requests) == max(prompts, 1) * body["n"] <= min(max_choices, sizes.scheduler.max_queue)
    while numbers and engine.steps < 20:
        deltas = engine.step()
        assert deltas or engine.scheduler.running, "each step gets on"
        numbers -= {delta.number for delta in deltas if delta.finish_reason}


def test_more_answers_than_the_queue_names_the_queue(loaded: Any) -> None:
    sizes = EngineConfig(scheduler=SchedulerConfig(max_queue=4))
    preparer = Preparer(*loaded, ServeConfig(checkpoint=CHECKPOINT, engine=sizes))
    for param, body in (("n", {"prompt": "a", "n": 5}), ("prompt", {"prompt": ["a", "b", "c"], "n": 2})):
        with pytest.raises(ApiError, match=r"at most 4 answers in all \(engine.scheduler.max_queue\)") as caught:
            preparer.completion(json.dumps(body).encode())
        assert (caught.value.status, caught.value.param) == (400, param)


def test_a_picture_is_digested_once_and_before_the_engine_has_it(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread, for which all streams wait, does not hash pixels, however many choices there are."""
    model, processor = loaded
    config = ServeConfig(checkpoint=CHECKPOINT)
    body = {"messages": [user("?", picture(0))], "n": 3}
    _, [prompt] = Preparer(model, processor, config).chat(json.dumps(body).encode())
    wanted = [expanded.image for expanded in _images(model, prompt.requests[0], digests=())]
    monkeypatch.setattr("parrot_sys.engine.requests.pixels_digest", lambda pixels: pytest.fail("hashed again"))
    for request in prompt.requests:
        assert [own.image for own in _images(model, request)] == wanted


def _images(model: Any, request: EngineRequest, **changes: Any) -> tuple[RequestImage, ...]:
    runner = model.lockstep
    changed = replace(request, **changes)
    return expand(changed, runner.rows_per_image, runner.guidance, runner.readers, guided=runner.guided).images


def test_a_checkpoint_without_a_tokenizer_is_said_to_have_none(loaded: Any) -> None:
    model, processor = loaded
    bare = copy.copy(processor)
    bare.tokenizer = MissingTokenizer("folder")
    with pytest.raises(CheckpointError, match="folder holds no tokenizer"):
        Preparer(model, bare, ServeConfig(checkpoint=CHECKPOINT))
