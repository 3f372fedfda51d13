"""The real server under clients that leave, read slowly or ask too much; when it is to stop, and when it fails."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.proxy import proxy_to
from tests.support.serving import Server, answer, chat, picture, serving
from tests.support.serving_faults import FATAL_SEED, fail_on_fatal_seed, hold_pictures, slow_steps, small_send_buffers

ORIGIN = "https://page.example"
KEY, OTHER_KEY = "first-key", "second-key"
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 1, "seed": 1}
DECODING_SECONDS = 0.2
"""Longer than the tiny model takes for a token."""
SECRET = "a word that nobody else writes: xylographer"


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures are decoded once this file is there."""
    return tmp_path_factory.mktemp("gate") / "open"


def _prepare(gate: str) -> None:
    hold_pictures(gate, DECODING_SECONDS)
    small_send_buffers()  # else the operating system takes all that a slow reader does not read


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(f"{KEY}\n\n")
    options = ["--api-key-file", str(folder / "keys"), "--stream-queue", "4", "--cors-origins", ORIGIN]
    options += ["--engine.scheduler.max-running", "4", "--engine.scheduler.max-queue", "4"]
    before = functools.partial(_prepare, str(gate))
    with serving(folder, *options, before=before, environment=[("PARROT_API_KEY", OTHER_KEY)]) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def _raw(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _whole_answer(client: socket.socket) -> bytes:
    """An answer on a connection that stays open."""
    data = bytearray()
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < _length(data):
        data += client.recv(2**16)
    return bytes(data)


def _length(data: bytes) -> int:
    (line,) = [own for own in data.split(b"\r\n") if own.lower().startswith(b"content-length:")]
    return int(line.partition(b":")[2])


def _address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("proxied", [True, False])
def test_who_leaves_gives_everything_back(server: Server, stream: bool, proxied: bool) -> None:
    host, port = _address(server)
    before, ends = server.wait_idle()["vllm:generation_tokens_total"], server.ends()
    with proxy_to(host, port) as proxy:
        with socket.create_connection((host, proxy.port if proxied else port)) as client:
            for _ in range(2):  # whole answers on a connection that is kept
                client.sendall(_raw(chat("?", max_tokens=1)))
                assert b"200 OK" in _whole_answer(client)
            client.sendall(_raw(chat("?", stream=stream, **{**LONG, "n": 4})))
            server.wait_for(lambda found: found["vllm:num_requests_running"] > 0)
        after = server.wait_idle()
        if proxied:
            assert (proxy.requests, proxy.opened) == (3, 1), "one connection to the server took them all"
            with httpx2.Client(base_url=f"http://{host}:{proxy.port}") as others:
                assert others.get("/v1/nothing").status_code == others.get("/v1/models").status_code == 401
            assert (proxy.requests, proxy.opened) == (5, 2), "the proxy has closed that of the client that left"
    made = after["vllm:generation_tokens_total"] - before
    assert made < 4 * LONG["max_tokens"], "the answers were not made to their end"
    assert after["parrot:num_requests_paused"] == 0
    assert server.ends() == {**ends, "length": ends["length"] + 2, "abort": ends["abort"] + 4}


def test_a_slow_reader_rests_and_gets_all(server: Server, http: httpx2.Client) -> None:
    body = chat("?", stream=True, logprobs=True, top_logprobs=20, n=4, **LONG)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        client.connect(_address(server))
        client.sendall(_raw(body))
        found = server.wait_for(lambda now: now["parrot:num_requests_paused"] > 0)
        assert found["parrot:num_requests_paused"] <= 4
        found = server.wait_for(lambda now: not now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"])
        assert found["vllm:kv_cache_usage_perc"] == 0, "answers that rest hold no blocks"
        assert answer(http, chat("?")), "others are answered meanwhile"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
        data = bytearray()
        while b"[DONE]" not in data[-4096:]:
            data += (more := client.recv(2**20))
            assert more, "the stream ends with its end"
    lines = [line for line in data.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    tokens = [len(own["logprobs"]["content"]) for chunk in chunks for own in chunk["choices"] if own["logprobs"]]
    assert sum(tokens) == 4 * LONG["max_tokens"]
    assert server.wait_idle()["parrot:num_requests_paused"] == 0


def test_too_many_requests_are_told_to_come_again(server: Server, http: httpx2.Client) -> None:
    """And one that is larger than the queue is not: it would come again for ever."""
    before = server.wait_idle()["vllm:generation_tokens_total"]
    body = chat("?", **{**LONG, "n": 4})
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(http.post, "/v1/chat/completions", json=body) for _ in range(6)]
        answered = [own.result() for own in asked]
    refused = [own for own in answered if own.status_code != 200]
    assert 0 < len(refused) < len(answered)
    for own in refused:
        assert (own.status_code, own.json()["error"]["code"]) == (429, "queue_full")
        assert own.headers["retry-after"] == "1"
    made = server.wait_idle()["vllm:generation_tokens_total"] - before
    assert made == 4 * LONG["max_tokens"] * (len(answered) - len(refused)), (
        "all answers of a request are taken, or none"
    )
    never = http.post("/v1/chat/completions", json=chat("?", n=5))
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    assert "engine.scheduler.max_queue" in never.json()["error"]["message"]


def test_health_is_told_while_every_worker_decodes(server: Server, http: httpx2.Client, gate: Path) -> None:
    """And the first token of an answer is late by the time that its picture took."""
    before = server.wait_idle()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(answer, http, chat("?", picture(k))) for k in range(4)]
        for _ in range(5):
            assert http.get("/health").status_code == 200
            time.sleep(0.02)
        assert not any(own.done() for own in asked)
        gate.touch()
        assert all(isinstance(own.result(), str) for own in asked)
    name = "vllm:time_to_first_token_seconds_sum"
    assert server.wait_idle()[name] - before[name] >= 4 * DECODING_SECONDS


def test_keys(server: Server, http: httpx2.Client) -> None:
    for key, status in (("", 401), ("Bearer nonsense", 401), (KEY, 401), (f"Bearer {OTHER_KEY}", 200)):
        for path in ("/v1/models", "/v1/nothing", "/health", "/"):
            got = httpx2.get(server.url + path, headers={"Authorization": key} if key else {})
            wanted = status if path == "/v1/models" else {"/v1/nothing": 401 if status == 401 else 404}.get(path, 200)
            assert got.status_code == wanted, (key, path)
    refused = httpx2.post(f"{server.url}/v1/chat/completions", json=chat("?"))
    assert refused.json()["error"]["code"] == "invalid_api_key"
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://x.y", None)):
        refused = httpx2.post(f"{server.url}/v1/chat/completions", json=chat("?"), headers={"Origin": origin})
        assert refused.status_code == 401
        assert refused.headers.get("access-control-allow-origin") == allowed, "the page may read why"
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": "https://x.y"}).headers


@pytest.mark.parametrize(
    ("data", "kind", "status", "param"),
    [
        (b'{"messages": [{"role": "user"', "application/json", 400, None),
        (b"\xff\xfe", "application/json", 400, None),
        (b'{"messages": [{"role": "user", "content": 3}]}', "application/json", 400, "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1.5}', "application/json", 400, "seed"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tempreature": 1}', "application/json", 400, "tempreature"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "text/plain", 415, None),
    ],
)
def test_bodies_that_are_wrong(http: httpx2.Client, data: bytes, kind: str, status: int, param: str | None) -> None:
    got = http.post("/v1/chat/completions", content=data, headers={"Content-Type": kind})
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}


def test_the_log_has_no_texts(server: Server, http: httpx2.Client) -> None:
    assert http.post("/v1/chat/completions", json=chat(SECRET), headers={"X-Request-Id": "mine-1"}).status_code == 200
    (line,) = [own for own in server.logged("request") if own["id"] == "mine-1"]
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/chat/completions", 200, 8)
    assert "xylographer" not in server.log.read_text()
    assert KEY not in server.log.read_text()


def test_sigterm_lets_answers_end(tmp_path: Path) -> None:
    with serving(tmp_path, before=functools.partial(slow_steps, 0.01)) as server, server.http() as http:
        body = chat("?", stream=True, **{**LONG, "max_tokens": 60})
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.process.pid is not None
            os.kill(server.process.pid, signal.SIGTERM)
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0
        with pytest.raises(httpx2.ConnectError):
            http.get("/health")
    assert [own["event"] for own in map(json.loads, server.log.read_text().splitlines()[-2:])][-1] == "stopped"


@pytest.mark.parametrize(
    "layout", ["tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size"]
)
def test_two_ranks_serve_one_model(
    server: Server, http: httpx2.Client, gate: Path, tmp_path: Path, layout: str
) -> None:
    """They answer as one process does, and end together."""
    gate.touch()
    bodies = [chat("?"), chat("What is this?", picture(1), parrot_routing=True)]
    wanted = [http.post("/v1/chat/completions", json=body).json() for body in bodies]
    with serving(tmp_path, f"--parallel.{layout}", "2", ranks=2) as pair, pair.http() as client:
        for body, one in zip(bodies, wanted, strict=True):
            two = client.post("/v1/chat/completions", json=body).json()
            assert two["choices"] == one["choices"]
        words = [own["parrot_routing"]["images"][0]["attention"] for own in (one, two)]
        weights = [[word["weight"] for word in own] for own in words]
        assert weights[0] == pytest.approx(weights[1], abs=1e-4)
        (follower,) = pair.followers
        assert pair.stop() == 0
        follower.join(30)
        assert follower.exitcode == 0


def test_a_rank_that_is_lost_is_told_like_any_failure(tmp_path: Path) -> None:
    layout = ["--parallel.tensor-model-parallel-size", "2", "--linger-seconds", "1"]
    with serving(tmp_path, *layout, ranks=2) as pair, pair.http() as client:
        assert answer(client, chat("?"))
        (follower,) = pair.followers
        follower.kill()
        follower.join()
        assert client.post("/v1/chat/completions", json=chat("?")).status_code == 503
        pair.process.join(30)
        assert pair.process.exitcode == 1


def test_a_dead_engine_is_told_and_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path, "--linger-seconds", "2", before=fail_on_fatal_seed) as server, server.http() as http:
        body = chat("?", stream=True, **LONG)
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            fatal = http.post("/v1/chat/completions", json=chat("?", seed=FATAL_SEED))
            assert (fatal.status_code, fatal.json()["error"]["code"]) == (503, "engine_dead")
            rest = [line for line in lines if line]
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert http.get("/health").status_code == 503
        assert http.post("/v1/chat/completions", json=chat("?")).status_code == 503
        assert server.ends() == {"stop": 0, "length": 0, "abort": 0, "error": 2}
        server.process.join(30)
        assert server.process.exitcode == 1
