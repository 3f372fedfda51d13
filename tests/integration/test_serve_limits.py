"""The real server with small limits: of time, of bytes that are held; and with texts in its log."""

from __future__ import annotations

import functools
import json
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

from tests.support.serving import Server, answer, chat, serving
from tests.support.serving_faults import slow_steps

ENDLESS = {"max_tokens": 400, "ignore_eos": True}
MOST_BYTES = 2**20
JSON = "application/json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--request-seconds", "1", "--body-seconds", "3", "--max-pending-bytes", str(MOST_BYTES), "--log-texts"]
    with serving(tmp_path_factory.mktemp("serve"), *options, before=functools.partial(slow_steps, 0.02)) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http() as client:
        yield client


def test_answers_that_take_too_long_end(server: Server, http: httpx2.Client) -> None:
    whole = http.post("/v1/chat/completions", json=chat("?", **ENDLESS))
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    stream = http.post("/v1/chat/completions", json=chat("?", stream=True, **ENDLESS))
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    assert (stream.status_code, events[-1]) == (200, "[DONE]")
    assert json.loads(events[-2])["error"]["code"] == "timeout"
    server.wait_idle()


def test_bodies_that_do_not_arrive_hold_others_up_for_so_long_only(server: Server, http: httpx2.Client) -> None:
    """What has arrived of them counts as held; it is given back when their time is over."""
    host, port = server.url.removeprefix("http://").split(":")
    size = MOST_BYTES * 3 // 4
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {size}\r\n\r\n"
    large = {"content": b" " * (MOST_BYTES // 2), "headers": {"Content-Type": JSON}}
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(head.encode() + b" " * (size - 1))
        # (Were both read at the same time, either might be refused.)
        time.sleep(0.5)
        refused = http.post("/v1/chat/completions", **large)
        assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("too_many_bytes", "1")
        late = bytearray()
        while not late.endswith(b"}"):
            late += (more := client.recv(2**16))
            assert more
    assert late.startswith(b"HTTP/1.1 408 ")
    assert json.loads(late.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
    assert http.post("/v1/chat/completions", **large).json()["error"]["code"] == "invalid_json"


def test_texts_are_in_the_log_when_that_is_asked_for(server: Server, http: httpx2.Client) -> None:
    body = chat("What does the xylographer say?")
    text = answer(http, body)
    end = time.monotonic() + 30
    while not (lines := [own for own in server.logged("request") if own.get("answers")]):  # (after the answer)
        assert time.monotonic() < end
        time.sleep(0.02)
    line = lines[-1]
    assert "What does the xylographer say?" in line["prompts"][0]
    assert line["answers"][0]["message"]["content"] == text
