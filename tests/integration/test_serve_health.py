"""`/health` of the real server: answered while the event loop is blocked, and however the question arrives."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.support.serving import Server, chat, serving
from tests.support.serving_faults import FATAL_SEED, block_loop_on_fatal_seed, few_descriptors

BLOCKED_SECONDS = 3.0
HEAD_SECONDS = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = functools.partial(block_loop_on_fatal_seed, BLOCKED_SECONDS)
    with serving(tmp_path_factory.mktemp("serve"), before=before) as running:
        yield running


def _asked(server: Server, *pieces: bytes) -> bytes:
    """The whole answer to a request that is sent in pieces."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.05)
        data = bytearray()
        while more := client.recv(2**16):
            data += more
        return bytes(data)


def test_a_blocked_event_loop_does_not_keep_health_waiting(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        body = chat("?", seed=FATAL_SEED, max_tokens=1)
        blocked = pool.submit(httpx2.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
        time.sleep(0.5)
        seconds = []
        while not blocked.done() and len(seconds) < 20:
            start = time.monotonic()
            answered = httpx2.get(f"{server.url}/health", timeout=60)
            seconds.append(time.monotonic() - start)
            assert (answered.status_code, answered.json()) == (200, {"status": "ok"})
        assert not blocked.done(), "the event loop was blocked all the time"
        assert blocked.result().status_code == 200
    assert sorted(seconds)[len(seconds) // 2] < BLOCKED_SECONDS / 10


@pytest.mark.parametrize("end", [b"", b"?x=1"])
@pytest.mark.parametrize("cut", [None, 3, 11, 12, 30])
def test_a_question_may_come_in_pieces(server: Server, end: bytes, cut: int | None) -> None:
    whole = b"GET /health" + end + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    pieces = (whole,) if cut is None else (whole[:cut], whole[cut:])
    head, _, body = _asked(server, *pieces).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(body) == {"status": "ok"}


def test_other_paths_and_clients_that_say_nothing(server: Server) -> None:
    assert _asked(server, b"GET /healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 404")
    assert _asked(server, b"POST /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 405")
    assert b"400" in _asked(server, b"\x16\x03\x01" + b"\0" * 20).split(b"\r\n")[0], "a TLS hello"
    host, port = server.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(50)]
    with httpx2.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
        assert client.get("/health").status_code == 200, "on the connection of the request before"
    for each in silent:
        each.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with few descriptors and short times."""
    options = ["--head-seconds", str(HEAD_SECONDS), "--body-seconds", str(HEAD_SECONDS)]
    before = functools.partial(few_descriptors, 256)
    with serving(tmp_path_factory.mktemp("small"), *options, before=before) as running:
        yield running


def _rest(client: socket.socket) -> bytes:
    """What is sent until the connection is closed."""
    data = bytearray()
    client.settimeout(30)
    while more := client.recv(2**16):
        data += more
    return bytes(data)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("begin", "piece", "wanted"),
    [
        (b"", b"", b""),
        (b"G", b"", b"408"),
        (b"GET /health HTTP/1.1\r\n", b"", b""),
        (b"GET / HTTP/1.1\r\nX: ", b"x", b"408"),
        (HEAD + b"Content-Length: 999\r\n\r\n", b"x", b"408"),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n", b"x", b"404"),
    ],
)
def test_who_says_nothing_or_little_is_not_waited_for(small: Server, begin: bytes, piece: bytes, wanted: bytes) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client, ThreadPoolExecutor(1) as pool:
        client.sendall(begin)
        rest = pool.submit(_rest, client)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                if rest.done():
                    break
                client.sendall(piece)
                time.sleep(0.02)
        assert rest.result(30)[9:12] == wanted


def test_connections_do_not_use_up_what_health_needs(small: Server) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as held:
        for begin in (b"", b"GET / HTTP/1.1\r\n", b""):
            clients = []
            for _ in range(300):
                clients.append(held.enter_context(socket.create_connection((host, int(port)))))
                clients[-1].sendall(begin)
            assert httpx2.get(f"{small.url}/health", timeout=10).status_code == 200
            if begin:
                assert {_rest(client)[9:12] for client in clients} == {b"408", b"503"}
    assert httpx2.get(f"{small.url}/v1/models", timeout=10).status_code == 200


def test_silent_connections_do_not_keep_a_server_from_its_end(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-seconds", "20") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))):
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 10
