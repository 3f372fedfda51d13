"""`parrot serve` as a process of its own, and what tests ask of it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import openai
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINT = FIXTURES / "parrot_tiny" / "model"
# Imports cost each server seconds: they are made once, in a process that forks the servers.
_PRELOADED = ["parrot_sys.__main__", "parrot_sys.serving.server", "parrot_sys.inference.pretrained"]
_PRELOADED += ["parrot_sys.megatron.model", "parrot_sys.systems.load", "parrot_sys.systems.export"]
_START_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that runs."""

    url: str
    process: BaseProcess
    log: Path
    followers: list[BaseProcess]
    """Further ranks."""

    def openai(self, **options: Any) -> openai.OpenAI:
        """A client, without retries."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        )

    def http(self, **options: Any) -> httpx2.Client:
        """A client for everything else."""
        return httpx2.Client(base_url=self.url, **{"timeout": 60, **options})

    def metrics(self) -> dict[str, float]:
        """Sum of each metric over its labels."""
        found: dict[str, float] = {}
        for sample in self.samples():
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def samples(self) -> list[Sample]:
        """All samples of the metrics, with their labels."""
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def ends(self) -> dict[str, float]:
        """Answers so far by how they ended, in vLLM's words."""
        own = [sample for sample in self.samples() if sample.name == "vllm:request_success_total"]
        return {sample.labels["finished_reason"]: sample.value for sample in own}

    def wait_for(self, condition: Callable[[dict[str, float]], bool], *, seconds: float = 30) -> dict[str, float]:
        """Metrics once they are as wanted."""
        end = time.monotonic() + seconds
        while not condition(found := self.metrics()):
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found

    def wait_idle(self) -> dict[str, float]:
        """Metrics once no request holds anything."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "parrot:num_requests_paused")
        return self.wait_for(lambda found: not any(found[name] for name in (*names, "vllm:kv_cache_usage_perc")))

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Lines of the log about an event."""
        lines = self.log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        """Asks the process to end; its exit code."""
        assert self.process.pid is not None, "the process has been started"
        os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


@contextlib.contextmanager
def serving(
    folder: Path,
    *options: str,
    checkpoint: Path = CHECKPOINT,
    before: Callable[[], None] | None = None,
    environment: Sequence[tuple[str, str]] = (),
    ranks: int = 1,
) -> Iterator[Server]:
    """Runs `parrot serve`.

    Args:
        folder: for its log.
        options: of the command line.
        checkpoint: that is served.
        before: called in the process before the command.
        environment: further variables.
        ranks: processes that serve the model together.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    log = folder / "serve.log"
    log.touch()
    argv = ["serve", "--checkpoint", str(checkpoint), "--port", "0", *options]
    processes = [
        context.Process(target=_run, args=(argv, str(log), before, (*environment, *launch)))
        for launch in _launches(ranks)
    ]
    for process in processes:
        process.start()
    try:
        yield Server(url=_wait_ready(processes[0], log), process=processes[0], log=log, followers=processes[1:])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _launches(ranks: int) -> list[list[tuple[str, str]]]:
    """Variables that torchrun sets in each process."""
    if ranks == 1:
        return [[]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free.getsockname()[1]))]
    size = [("WORLD_SIZE", str(ranks)), ("LOCAL_WORLD_SIZE", str(ranks))]
    return [[*place, *size, ("RANK", str(rank)), ("LOCAL_RANK", str(rank))] for rank in range(ranks)]


def _run(argv: list[str], log: str, before: Callable[[], None] | None, environment: Sequence[tuple[str, str]]) -> None:
    import torch

    from parrot_sys.__main__ import main

    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    os._exit(main(argv))


def _wait_ready(process: BaseProcess, log: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        for line in log.read_text().splitlines():
            facts = json.loads(line) if line.startswith("{") else {"event": ""}
            if facts["event"] == "ready" and facts["pid"] == process.pid:  # (replicas log as well)
                url: str = facts["url"]
                return url
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"not ready after {_START_SECONDS} seconds: {log.read_text()}")


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (40, 28)) -> bytes:
    """A PNG whose colours follow from `seed`."""
    image = Image.linear_gradient("L").resize(size)
    return png(Image.merge("RGB", [image.point(lambda v, k=k: (v * (k + 1) + 37 * seed) % 256) for k in range(3)]))


def data_url(file: bytes, kind: str = "image/png") -> str:
    """The file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def user(text: str, *files: bytes) -> dict[str, Any]:
    """A message with pictures before its text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def chat(text: str, *files: bytes, **options: Any) -> dict[str, Any]:
    """Body of a greedy request to `/v1/chat/completions`."""
    return {"messages": [user(text, *files)], "temperature": 0, "max_tokens": 8, **options}


def answer(client: httpx2.Client, body: dict[str, Any]) -> str:
    """Text of the first answer to a body of `chat`."""
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text
