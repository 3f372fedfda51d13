"""The server of one model: its parts, its start and its end."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from parrot_sys.data.languages import language_codes
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.core import Engine
from parrot_sys.engine.graphs import capture_graph
from parrot_sys.errors import ConfigError
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.serving.app import Service, create_app
from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.driver import EngineDriver
from parrot_sys.serving.http import BodyReader, Guard, HeldBytes, KeyCheck
from parrot_sys.serving.metrics import Metrics
from parrot_sys.serving.process import Server, log, settings_of
from parrot_sys.serving.prompts import Preparer
from parrot_sys.serving.warmup import warm_up
from parrot_sys.serving.workers import Workers
from parrot_sys.systems.registry import system_of

_SWITCH_SECONDS = 0.001
"""The loop answers while the engine's thread works in Python."""


class _ModelServer(Server):
    """Starts and ends the engine's thread, and ends when the engine has failed."""

    def __init__(self, settings: uvicorn.Config, service: Service, listener: socket.socket) -> None:
        facts = {"model": service.preparer.name}
        super().__init__(
            settings,
            listener,
            facts=facts,
            is_healthy=lambda: not service.driver.is_dead,
            head_seconds=service.config.head_seconds,
        )
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the engine's thread and listens."""
        self._service.driver.start(asyncio.get_running_loop(), self._engine_died)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; answers get their time to end, then end with an error."""
        seconds, driver = self._service.config.drain_seconds, self._service.driver
        asyncio.get_running_loop().call_later(seconds, driver.end_all, "the server stops")
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
        service.metrics.count_http(facts.pop("route"), facts["method"], facts["status"], facts["seconds"])
        log("request", **facts)

    app: ASGIApp = KeyCheck(create_app(service), keys)
    if config.cors_origins:  # outside of the keys: a page may read that its key is wrong
        app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    app = Guard(app, on_answer=on_answer)
    # What is there now stays; a collection of garbage that looks at all of it stops every thread for 200 ms.
    gc.collect()
    gc.freeze()
    server = _ModelServer(uvicorn.Config(app, **settings_of(config.drain_seconds)), service, listener)
    asyncio.run(server.serve([listener]))
    stopped = service.driver.stop()
    service.workers.shutdown(wait=False, cancel_futures=True)
    if service.driver.is_dead or not stopped:
        reason = repr(service.driver.error) if service.driver.is_dead else "a step does not end"
        log("stopped", reason="the engine has failed", error=reason)
        sys.stderr.flush()
        os._exit(1)  # other ranks may wait in a step for ever: who has started them ends them
    log("stopped")
    return 0


def _service(model: ParrotForConditionalGeneration, processor: ParrotProcessor, config: ServeConfig) -> Service:
    """The parts of the server, warm."""
    if config.cuda_graphs:
        if model.device.type != "cuda":
            raise ConfigError(f"cuda_graphs needs a GPU, the model runs on {model.device}: leave it out")
        model.lockstep.capture = capture_graph
    preparer = Preparer(model, processor, config)
    warm_up(model, processor)
    engine = Engine(model.lockstep, config.engine, tokenizer=processor.tokenizer)
    limits = [most for most in (config.engine.limits.max_images, model.config.most_images) if most is not None]
    driver = EngineDriver(engine, stream_queue=config.stream_queue)
    return Service(
        config=config,
        processor=processor,
        preparer=preparer,
        driver=driver,
        metrics=Metrics(driver, preparer.name, preparer.max_rows),
        texts=preparer.texts,
        card={
            "system": system_of(model.config).name,
            "languages": list(language_codes(config.languages)),
            "max_images": min(limits, default=None),
            "num_experts": model.lockstep.num_experts,
        },
        workers=Workers(config.image_workers, waiting=config.remote.max_fetches if config.remote.enabled else 0),
        bodies=BodyReader(max_bytes=config.max_body, max_pending=config.max_pending_bytes, seconds=config.body_seconds),
        pixels=HeldBytes(config.max_pixel_bytes),
    )
