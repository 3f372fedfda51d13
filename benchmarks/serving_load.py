"""Many clients of a server at once: right ones, some that leave, some that send what no server should fall over."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import httpx2

from benchmarks.health_probe import watch_health

TRUNCATED = b'{"messages": [{"role": "user", "content": "'


@dataclass(kw_only=True)
class LoadResult:
    """Outcome of a run."""

    answers: int = 0
    """Answers that were compared."""
    wrong: list[str] = field(default_factory=list)
    """Those that differ from the answer of a request alone."""
    left: int = 0
    """Requests whose clients left."""
    hostile: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    health_seconds: list[float] = field(default_factory=list)

    @property
    def server_errors(self) -> int:
        """Answers with a status of 500 or above."""
        return sum(count for status, count in self.statuses.items() if status >= 500)


def questions(texts: Sequence[str], pictures: Sequence[bytes], new_tokens: int) -> list[dict[str, Any]]:
    """Greedy requests: each text with no, one and two of the pictures."""
    urls = [f"data:image/png;base64,{base64.b64encode(own).decode()}" for own in pictures]
    made = []
    for place, text in enumerate(texts):
        for count in range(3):
            own = [urls[(place + k) % len(urls)] for k in range(count)]
            parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in own]
            message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
            made.append({"messages": [message], "temperature": 0, "max_tokens": new_tokens + 3 * count})
    return made


def hostile_bodies(good: Mapping[str, Any]) -> list[bytes]:
    """Bodies that are refused."""
    addresses = ("data:image/png;base64,AAAA", "http://127.0.0.1/", _bomb())
    pictures = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    changes: list[dict[str, Any]] = [
        *({"messages": [{"role": "user", "content": [picture]}]} for picture in pictures),
        {"messages": 3},
        {"temperature": -1},
        {"n": 10**9},
        {"max_tokens": 10**15},
        {"unknown": True},
    ]
    return [TRUNCATED, b"", b"\xff" * 100, *(json.dumps({**good, **change}).encode() for change in changes)]


def _bomb() -> str:
    """Address of a PNG of a few bytes whose pixels would take 13 GB."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


async def ask(client: httpx2.AsyncClient, body: Mapping[str, Any]) -> str:
    """The answer to a request alone."""
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


class Load:
    """Clients that ask until the time is over."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        bodies: Sequence[Mapping[str, Any]],
        wanted: Sequence[str],
        *,
        leaving: float,
        hostile: float,
        seed: int = 0,
    ) -> None:
        """
        Args:
            client: of the server.
            bodies: requests.
            wanted: their answers.
            leaving: part of the requests whose clients leave.
            hostile: part of the requests that are refused.
            seed: of what each client does.
        """
        self.result = LoadResult()
        self._client = client
        self._bodies = bodies
        self._wanted = wanted
        self._leaving = leaving
        self._hostile = hostile
        self._bad = hostile_bodies(bodies[0])
        self._seed = seed

    async def run(self, *, streams: int, seconds: float) -> LoadResult:
        """Asks with so many clients at once for so long."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        await asyncio.gather(self._watch_health(seconds), *(self._ask_until(end, number) for number in range(streams)))
        return self.result

    async def _watch_health(self, seconds: float) -> None:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(pool, watch_health, str(self._client.base_url), seconds)
        for status, taken in answers:
            self.result.health_seconds.append(taken)
            self.result.statuses[status] += 1

    async def _ask_until(self, end: float, number: int) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            kind = draw.random()
            if kind < self._hostile:
                await self._send_hostile(draw)
            elif kind < self._hostile + self._leaving:
                await self._leave(draw)
            else:
                await self._compare(draw)

    async def _send_hostile(self, draw: random.Random) -> None:
        headers = {"Content-Type": "application/json"}
        response = await self._client.post("/v1/chat/completions", content=draw.choice(self._bad), headers=headers)
        self.result.hostile += 1
        self.result.statuses[response.status_code] += 1
        if response.status_code < 400:
            self.result.wrong.append(f"a hostile request was answered with {response.status_code}")

    async def _leave(self, draw: random.Random) -> None:
        """Leaves after some time, however far the answer is."""
        body = {**draw.choice(self._bodies), "stream": draw.random() < 0.5, "max_tokens": 200, "ignore_eos": True}
        task = asyncio.ensure_future(self._client.post("/v1/chat/completions", json=body))
        await asyncio.wait([task], timeout=draw.random() * 0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.result.left += 1

    async def _compare(self, draw: random.Random) -> None:
        place = draw.randrange(len(self._bodies))
        streaming = draw.random() < 0.5
        body = {**self._bodies[place], "stream": streaming}
        response = await self._client.post("/v1/chat/completions", json=body)
        self.result.statuses[response.status_code] += 1
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]))
            return
        if response.status_code != 200:
            self.result.wrong.append(f"status {response.status_code}: {response.text[:200]}")
            return
        text = _streamed_text(response.text) if streaming else response.json()["choices"][0]["message"]["content"]
        self.result.answers += 1
        if text != self._wanted[place]:
            self.result.wrong.append(f"request {place}: {text!r} instead of {self._wanted[place]!r}")


def _streamed_text(events: str) -> str:
    """Text of a whole stream; says so where it is none."""
    lines = [line.removeprefix("data: ") for line in events.split("\n") if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        return "no end of the stream"
    chunks = [json.loads(line) for line in lines[:-1]]
    if errors := [chunk["error"] for chunk in chunks if "error" in chunk]:
        return f"error {errors[0]}"
    return "".join(own["delta"].get("content", "") for chunk in chunks for own in chunk["choices"])
