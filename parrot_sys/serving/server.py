"""The server as a process: its parts, its signals, its log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn

from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.core import Engine
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.serving.app import Service, create_app
from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.driver import EngineDriver
from parrot_sys.serving.http import BodyReader, Guard
from parrot_sys.serving.metrics import Metrics
from parrot_sys.serving.prompts import Preparer
from parrot_sys.serving.token_texts import TokenTexts
from parrot_sys.serving.warmup import warm_up
from parrot_sys.systems.registry import system_of

_KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep a connection: else they send requests into one that just closed."""
_SWITCH_SECONDS = 0.001
"""The loop answers while the engine's thread works in Python."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """Ends in order when it is asked to, and when the engine has failed."""

    def __init__(self, settings: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        super().__init__(settings)
        self._service = service
        self._listener = listener

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals; unlike uvicorn's own, none ends the process once answers have ended."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the engine's thread and listens."""
        self._service.driver.start(asyncio.get_running_loop(), self._engine_died)
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        log("ready", url=f"http://{address}:{port}", model=self._service.preparer.name, pid=os.getpid())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; answers get their time to end, then end with an error."""
        log("draining", seconds=self._service.config.drain_seconds)
        asyncio.get_running_loop().call_later(
            self._service.config.drain_seconds, self._service.driver.end_all, "the server stops"
        )
        await super().shutdown(sockets)

    def _engine_died(self) -> None:
        def give_up() -> None:
            self.should_exit = True

        asyncio.get_running_loop().call_later(self._service.config.linger_seconds, give_up)


def serve(
    model: ParrotForConditionalGeneration,
    processor: ParrotProcessor,
    config: ServeConfig,
    keys: Sequence[str],
    listener: socket.socket,
) -> int:
    """Serves a model until the process is asked to end; 0 then, and 1 after the engine has failed.

    Args:
        model: to be asked.
        processor: of the model.
        config: settings.
        keys: of which requests must bring one; none: nothing is asked for.
        listener: takes connections.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    service = _service(model, processor, config)

    def on_answer(facts: dict[str, Any]) -> None:
        service.metrics.count_http(facts.pop("route"), facts["status"])
        log("request", **facts)

    settings = uvicorn.Config(
        Guard(create_app(service), keys=keys, on_answer=on_answer),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(config.drain_seconds) + 5,
    )
    server = _Server(settings, service, listener)
    asyncio.run(server.serve([listener]))
    service.driver.stop()
    service.workers.shutdown(wait=False, cancel_futures=True)
    if service.driver.is_dead:
        log("stopped", reason="the engine has failed", error=repr(service.driver.error))
        sys.stderr.flush()
        os._exit(1)  # other ranks may wait in a step for ever: who has started them ends them
    log("stopped")
    return 0


def _service(model: ParrotForConditionalGeneration, processor: ParrotProcessor, config: ServeConfig) -> Service:
    """The parts of the server, warm."""
    preparer = Preparer(model, processor, config)
    warm_up(model, processor)
    engine = Engine(model.lockstep, config.engine, tokenizer=processor.tokenizer)
    driver = EngineDriver(engine, stream_queue=config.stream_queue)
    return Service(
        config=config,
        processor=processor,
        preparer=preparer,
        driver=driver,
        metrics=Metrics(driver, preparer.name),
        texts=TokenTexts(processor.tokenizer),
        card={
            "system": system_of(model.config).name,
            "languages": list(config.languages),
            "max_images": config.engine.limits.max_images,
            "num_experts": model.lockstep.num_experts,
        },
        workers=ThreadPoolExecutor(config.image_workers, thread_name_prefix="prepare"),
        bodies=BodyReader(max_bytes=config.max_body, max_pending=config.max_pending_bytes, seconds=config.body_seconds),
    )


def log(event: str, **facts: Any) -> None:
    """One line of JSON on standard error."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()
