"""Texts of the real server: streams against whole answers, stop strings, log-probabilities, requests of lm-eval."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from tests.support.serving import Server, chat, picture, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve")) as running:
        yield running


def _streamed(http: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streams_are_whole_answers_in_pieces(server: Server) -> None:
    """Drawn answers of a vocabulary of bytes: characters are split over tokens all the time."""
    split = 0
    with server.http() as http:
        for seed in range(12):
            body = chat("?", temperature=3.0, seed=seed, max_tokens=40, logprobs=True, ignore_eos=True)
            choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
            tokens = choice["logprobs"]["content"]
            data = bytes(byte for own in tokens for byte in own["bytes"] if not own["token"].startswith("<|"))
            assert choice["message"]["content"] == data.decode(errors="replace")
            chunks = _streamed(http, "/v1/chat/completions", body)
            pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert "".join(pieces) == choice["message"]["content"]
            told = [chunk["choices"][0]["logprobs"] or {"content": []} for chunk in chunks]
            streamed = [own for each in told for own in each["content"]]
            assert [own["token"] for own in streamed] == [own["token"] for own in tokens]
            split += sum(own["token"].startswith("bytes:") for own in tokens)
    assert split > 20


def test_a_literal_replacement_character_is_text(server: Server) -> None:
    text = "\ufffd caf\u00e9 \ufffd\ufffd"
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text
        body = {"prompt": text, "echo": True, "max_tokens": 0}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == text
        assert "".join(own["choices"][0]["text"] for own in _streamed(http, "/v1/completions", body)) == text


def test_stop_strings_across_tokens(server: Server) -> None:
    with server.http() as http:
        body = chat("What is this?", max_tokens=30, logprobs=True, ignore_eos=True)
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
        text, tokens = choice["message"]["content"], [own["token"] for own in choice["logprobs"]["content"]]
        pairs = [(left, right) for left, right in pairwise(tokens) if "bytes:" not in left + right]
        stops = [left[-1] + right[0] for left, right in pairs if left and right]
        assert len(stops) > 2
        for stop in stops[:6]:
            ended = {**body, "logprobs": False, "stop": ["never in it", stop]}
            got = http.post("/v1/chat/completions", json=ended).json()["choices"][0]
            assert got["finish_reason"] == "stop"
            assert got["message"]["content"] == text[: text.index(stop)]
            pieces = [
                own["choices"][0]["delta"].get("content", "") for own in _streamed(http, "/v1/chat/completions", ended)
            ]
            assert "".join(pieces) == text[: text.index(stop)], "no part of a stop string is sent"


def test_log_probabilities_do_not_depend_on_other_requests(server: Server) -> None:
    def logprobs(http: httpx2.Client, salt: str) -> list[float]:
        body = chat("What is this?", picture(1), max_tokens=12, logprobs=True, cache_salt=salt)
        tokens = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
        return [own["logprob"] for own in tokens]

    with server.http() as http, ThreadPoolExecutor(12) as pool:
        alone = logprobs(http, "alone")
        others = [
            pool.submit(http.post, "/v1/chat/completions", json=chat("x " * k, *[picture(k)] * (k % 3), max_tokens=20))
            for k in range(1, 12)
        ]
        crowded = logprobs(http, "crowded")
        assert all(own.result().status_code == 200 for own in others)
    assert crowded == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_requests_of_lm_eval(server: Server, new_tokens: int) -> None:
    """Echoed log-probabilities of token ids, as lm-eval's `local-completions` reads them, and places in the text."""
    text = "What is this? \u8fd9\u662f\u4ec0\u4e48 \ufffd"
    with server.http() as http:
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        prompts = [ids, ids[:3], ids[:1]]
        settings = {
            "model": "model",
            "temperature": 0,
            "max_tokens": new_tokens,
            "logprobs": 1,
            "echo": True,
            "seed": 1,
        }
        answers = http.post("/v1/completions", json={"prompt": prompts, **settings}).json()
        streamed = _streamed(http, "/v1/completions", {"prompt": prompts, **settings})
        for place, (prompt, choice) in enumerate(zip(prompts, answers["choices"], strict=True)):
            own = choice["logprobs"]
            assert choice["index"] == place
            assert {len(each) for each in own.values()} == {len(prompt) + new_tokens}
            assert (own["token_logprobs"][0], own["top_logprobs"][0]) == (None, None)
            for token, value, top in list(zip(own["tokens"], own["token_logprobs"], own["top_logprobs"], strict=True))[
                1:
            ]:
                assert value <= max(top.values()) <= 0
                assert top[token] == value
            offsets = [*own["text_offset"], len(choice["text"])]
            assert offsets == sorted(offsets)
            for token, begin, end in zip(own["tokens"], offsets, offsets[1:], strict=False):
                if not token.startswith("bytes:") and end > begin:
                    assert choice["text"][begin:].startswith(token)
            parts = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == place]
            assert "".join(part["text"] for part in parts) == choice["text"]
            for name in ("tokens", "text_offset"):
                assert [each for part in parts for each in part["logprobs"][name]] == own[name]
        # What a continuation gets does not depend on how the text is cut into prompt and answer.
        alone = http.post("/v1/completions", json={**settings, "prompt": ids, "max_tokens": 1, "echo": False})
        if new_tokens:
            assert alone.json()["choices"][0]["logprobs"]["tokens"] == answers["choices"][0]["logprobs"]["tokens"][-1:]
        assert answers["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_several_answers_with_seeds(server: Server) -> None:
    with server.http() as http:
        body = chat("?", temperature=2.0, max_tokens=8, seed=7)
        three = http.post("/v1/chat/completions", json={**body, "n": 3}).json()["choices"]
        for place, choice in enumerate(three):
            alone = http.post("/v1/chat/completions", json={**body, "seed": 7 + place}).json()["choices"][0]
            assert choice["message"] == alone["message"]
        assert http.post("/v1/chat/completions", json={**body, "n": 17}).json()["error"]["param"] == "n"
