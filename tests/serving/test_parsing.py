"""Bodies of requests: whatever comes is a request, or an error that names the part that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.serving.errors import ApiError
from parrot_sys.serving.parsing import parse
from parrot_sys.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest

MESSAGE = {"role": "user", "content": "x"}
GOOD: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "u"}}]},
        {"role": "assistant", "content": "a"},
        MESSAGE,
    ],
    "temperature": 1,
    "top_logprobs": 2,
    "logprobs": True,
    "stop": ["x", "y"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


TOGETHER = {"logprobs", "top_logprobs", "stream", "stream_options"}
"""Fields of which one may need another."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in _places(each, (*path, key)))]


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _changed(value[path[0]], path[1:], new)
    return copied


def _name(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


@settings(max_examples=300)
@given(place=st.sampled_from(_places(GOOD)), new=JSON)
def test_a_wrong_part_is_named(place: tuple[Any, ...], new: Any) -> None:
    body = json.dumps(_changed(GOOD, place, new)).encode()
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest):
        error = _error_of(kind, body)
        if kind is ChatRequest and error is not None and error.param is not None and place:
            wrong, named = _name(place), error.param
            assert named.startswith(wrong) or wrong.startswith(named) or named.split(".")[0] in TOGETHER


def _error_of(kind: type[Any], body: bytes) -> ApiError | None:
    try:
        parse(kind, body)
    except ApiError as error:
        return error
    return None


@given(st.binary(max_size=60))
def test_bytes_of_any_kind(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("{", None),
        ("[]", None),
        ("[" * 100_000, None),
        ('{"messages": []}', "messages"),
        ("{}", "messages"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        ('{"messages": [{"role": "user", "content": 3}]}', "messages[0].content"),
        ('{"messages": [{"role": "user", "content": "x"}], "seed": ' + "9" * 5000 + "}", None),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "messages[0]"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "messages[0].content[0].text"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "messages[0].content[0]"),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": "1"}', "temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "tools"),
        ('{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1}}', "logit_bias"),
        ('{"messages": [{"role": "user", "content": "x"}], "tempreature": 1}', "tempreature"),
        ('{"messages": [{"role": "user", "content": "x"}], "stop": ["a", ""]}', "stop[1]"),
    ],
)
def test_bodies_that_are_wrong(body: str, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body.encode())
    assert (caught.value.status, caught.value.param) == (400, param), caught.value.message


def test_forms_of_prompts() -> None:
    for prompt in ("x", ["x", "y"], [1, 2], [[1], [2, 3]]):
        assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == prompt
    for prompt in ([], [[]], [1, "x"], [1.5], [-1], [True], {}):
        with pytest.raises(ApiError, match="prompt"):
            parse(CompletionRequest, json.dumps({"prompt": prompt}).encode())
