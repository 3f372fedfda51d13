"""Several real replicas behind one port: what clients are told through the process in front, and how replicas end."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.forked_replicas import FAULT_CODE, fork_replicas
from tests.support.serving import Server, answer, chat, picture, serving
from tests.support.serving_faults import slow_steps

KEY = "the-key"
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True, "temperature": 1, "seed": 1}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No replica can be started while this file is there."""
    return tmp_path_factory.mktemp("fault") / "fault"


def _prepare(fault: str) -> None:
    fork_replicas(fault)
    slow_steps(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, fault: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(KEY)
    options = ["--replicas", "2", "--api-key-file", str(folder / "keys")]
    options += ["--engine.limits.max-bytes", str(2 * MEGABYTE)]
    with serving(folder, *options, before=functools.partial(_prepare, str(fault))) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.http(headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def _children(server: Server) -> list[int]:
    """Processes of all replicas that were ever ready."""
    return [own["pid"] for own in server.logged("ready") if own["pid"] != server.process.pid]


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_both_answer(server: Server, http: httpx2.Client) -> None:
    wanted = answer(http, chat("What is this?", picture(1)))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: answer(http, chat("What is this?", picture(1))), range(8))) == {wanted}
    lines = [own for own in http.get("/metrics").text.splitlines() if own.startswith("vllm:generation_tokens_total")]
    for number in range(2):
        (line,) = [own for own in lines if f'engine="{number}"' in own]
        assert float(line.rsplit(" ", 1)[1]) > 0


def test_refusals_before_the_body_is_whole_arrive(server: Server, http: httpx2.Client) -> None:
    json_kind = {"Content-Type": "application/json"}
    for key, kind, size, status in (
        ("wrong", "application/json", 30 * MEGABYTE, 401),
        (KEY, "application/json", 3 * MEGABYTE, 413),
        (KEY, "application/json", 30 * MEGABYTE, 413),
        (KEY, "text/plain", 30 * MEGABYTE, 415),
    ):
        headers = json_kind | {"Content-Type": kind, "Authorization": f"Bearer {key}"}
        for _ in range(2):
            got = http.post("/v1/chat/completions", content=b"x" * size, headers=headers)
            assert got.status_code == status, (kind, size, got.text)
    assert answer(http, chat("?"))


def test_long_paths_stop_no_replica(server: Server, http: httpx2.Client) -> None:
    for _ in range(4):
        assert http.get("/" + 15_000 * "%01").status_code == 404
    _until(lambda: len([own for own in server.logged("request") if own["path"].startswith("/\x01")]) == 4)
    assert max(len(own["path"]) for own in server.logged("request")) <= 256
    for _ in range(4):
        assert http.get("/v1/models").status_code == 200


def test_who_leaves_a_stream_gives_everything_back(server: Server, http: httpx2.Client) -> None:
    before = server.wait_idle()["vllm:generation_tokens_total"]
    with http.stream("POST", "/v1/chat/completions", json=chat("?", stream=True, **{**LONG, "n": 4})) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        server.wait_for(lambda found: found["vllm:num_requests_running"] > 0)
    made = server.wait_idle()["vllm:generation_tokens_total"] - before
    assert made < 4 * LONG["max_tokens"], "the answers were not made to their end"


def test_a_replica_that_cannot_be_started_is_tried_again(server: Server, http: httpx2.Client, fault: Path) -> None:
    fault.touch()
    known = len(_children(server))
    os.kill(_children(server)[-1], signal.SIGKILL)
    _until(lambda: any(own["code"] == FAULT_CODE for own in server.logged("replica_ended")))
    assert answer(http, chat("?")), "the other one serves"
    assert httpx2.get(f"{server.url}/health").status_code == 200
    fault.unlink()
    _until(lambda: len(_children(server)) == known + 1)
    waits = [own["again_in"] for own in server.logged("replica_ended")]
    assert waits == sorted(waits)
    assert waits[-1] > waits[0], "each failed start is followed by a longer wait"
    assert answer(http, chat("?"))


def test_sigterm_lets_a_stream_end(tmp_path: Path, fault: Path) -> None:
    before = functools.partial(fork_replicas, str(fault))
    with serving(tmp_path, "--replicas", "2", before=before) as server, server.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=chat("?", stream=True, **LONG)) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.process.pid or 0, signal.SIGTERM)
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0
        assert len(server.logged("stopped")) == 2, "both replicas have ended in order"


def test_a_front_without_replicas_ends_with_an_error(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    before = functools.partial(fork_replicas, str(fault))
    with serving(tmp_path, "--replicas", "2", before=before) as server:
        fault.touch()
        for child in _children(server):
            os.kill(child, signal.SIGKILL)
        _until(lambda: httpx2.get(f"{server.url}/health").status_code == 503, 1)
        server.process.join(60)
        assert server.process.exitcode == 1
        assert server.logged("stopped")[-1]["reason"] == "no replica could be started again"


@pytest.mark.slow
def test_programs_of_their_own_share_a_port(tmp_path: Path) -> None:
    """As `parrot serve` starts them, without the fork of the tests above."""
    with serving(tmp_path, "--replicas", "2") as server, server.http() as http:
        wanted = answer(http, chat("What is this?", picture(1)))
        os.kill(_children(server)[0], signal.SIGKILL)
        _until(lambda: len(_children(server)) == 3)
        assert {answer(http, chat("What is this?", picture(1))) for _ in range(4)} == {wanted}
        assert server.stop() == 0
