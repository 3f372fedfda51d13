"""`parrot serve` under load: start, first answer, memory, cached pictures, then many clients for minutes.

    python -m benchmarks.bench_serving --checkpoint runs/demo/instruct/hf --minutes 10 \
        --json benchmarks/results/cpu/serving.json

Needs a checkpoint: `make demo` leaves one. Of the clients 30% leave before their answers end, and 5% send what has to
be refused; all other answers are compared with those of single requests. Blocks must come back to where they were, and
neither the cache of pictures nor memory may grow: growth is measured from the first tenth of the run on, when every
cache is warm.
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from benchmarks.harness import argument_parser, report
from benchmarks.serving_load import Load, LoadResult, ask, questions
from parrot_sys.inference.chat_texts import TEXTS

STREAMS, LEAVING, HOSTILE = 64, 0.3, 0.05
MIB = 2**20
_HOLDING = ("vllm:num_requests_running", "vllm:num_requests_waiting", "parrot:num_requests_paused")
"""Metrics of requests that hold something."""


def pictures(count: int, side: int = 200) -> list[bytes]:
    """PNG files, each of other colours."""
    ramp = Image.linear_gradient("L").resize((side, side))
    files = []
    for seed in range(count):
        bands = [ramp.point(lambda v, k=k, seed=seed: (v * (k + 1) + 61 * seed) % 256) for k in range(3)]
        file = io.BytesIO()
        Image.merge("RGB", bands).save(file, "PNG")
        files.append(file.getvalue())
    return files


@contextmanager
def served(checkpoint: Path) -> Iterator[tuple[str, float]]:
    """Address of a server, and the seconds until it was ready."""
    command = [sys.executable, "-m", "parrot_sys", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            while True:
                log.seek(0)
                lines = [json.loads(line) for line in log.read().splitlines() if line.startswith("{")]
                if ready := [line["url"] for line in lines if line["event"] == "ready"]:
                    yield ready[0], time.monotonic() - start
                    return
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended:\n{log.read()}")
                time.sleep(0.02)
        finally:
            process.terminate()
            process.wait()


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    """Sum of each metric over its labels."""
    found: dict[str, float] = {}
    for line in (await client.get("/metrics")).text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


async def first_token(client: httpx2.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds until the first token of a stream."""
    start = time.perf_counter()
    # (With log-probabilities, as the first token may have no text.)
    asked = {**body, "stream": True, "logprobs": True}
    async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["logprobs"]:
                return time.perf_counter() - start
    raise RuntimeError("the stream had no token")


async def cached_pictures(client: httpx2.AsyncClient) -> dict[str, Any]:
    """Time to first token with pictures that are new and known; tower runs for a known one with another prompt."""
    bodies = [questions(["What is in the picture?"], [own], 4)[1] for own in pictures(7)[2:]]
    cold, warm = [], []
    for body in bodies:
        cold.append(await first_token(client, body))
        warm.append(await first_token(client, body))
    before = (await metrics(client))["parrot:pictures_encoded_total"]
    await ask(client, questions(["Another question?"], [pictures(7)[2]], 4)[1])
    after = (await metrics(client))["parrot:pictures_encoded_total"]
    return {
        "first_token_cold_s": statistics.median(cold),
        "first_token_cached_s": statistics.median(warm),
        "tower_runs_for_another_prompt": int(after - before),
    }


async def _settled(client: httpx2.AsyncClient) -> dict[str, float]:
    """Metrics once nothing runs or waits."""
    while True:
        found = await metrics(client)
        if not any(found[name] for name in _HOLDING):
            return found
        await asyncio.sleep(0.1)


async def measure(url: str, *, streams: int, seconds: float) -> dict[str, Any]:
    """Everything after the start."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        start = time.perf_counter()
        bodies = questions([own.question for own in TEXTS.values()], pictures(4), 8)
        wanted = [await ask(client, bodies[1])]
        first = time.perf_counter() - start
        row: dict[str, Any] = {"first_answer_s": first, **(await cached_pictures(client))}
        wanted = [await ask(client, body) for body in bodies]
        load = Load(client, bodies, wanted, leaving=LEAVING, hostile=HOSTILE)
        await load.run(streams=streams, seconds=seconds / 10)
        warm = await _settled(client)
        result = await load.run(streams=streams, seconds=seconds * 9 / 10)
        end = await _settled(client)
    return {**row, **_summary(result, warm, end), "streams": streams, "seconds": seconds}


def _summary(result: LoadResult, warm: dict[str, float], end: dict[str, float]) -> dict[str, Any]:
    memory = [own["process_resident_memory_bytes"] for own in (warm, end)]
    ordered = sorted(result.health_seconds)
    return {
        "resident_mib": memory[1] / MIB,
        "memory_growth": memory[1] / memory[0] - 1,
        "answers": result.answers,
        "wrong": len(result.wrong),
        "left": result.left,
        "hostile": result.hostile,
        "server_errors": result.server_errors,
        "busy": result.statuses[429],
        "health_p99_s": ordered[int(0.99 * (len(ordered) - 1))],
        "blocks_held_after": end["vllm:kv_cache_usage_perc"],
        "picture_cache_growth_bytes": end["parrot:picture_cache_bytes"] - warm["parrot:picture_cache_bytes"],
        "preemptions": int(end["vllm:num_preemptions_total"]),
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argument_parser(__doc__, 1)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/instruct/hf"), help="what is served")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the load (default 10)")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"clients at once (default {STREAMS})")
    arguments = parser.parse_args()
    with served(arguments.checkpoint) as (url, ready):
        row = asyncio.run(measure(url, streams=arguments.streams, seconds=60 * arguments.minutes))
    rows = [{"property": name, "value": value} for name, value in {"ready_s": ready, **row}.items()]
    report("serving", rows, arguments.json)


if __name__ == "__main__":
    main()
