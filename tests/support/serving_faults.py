"""Faults of a server under test, set up in its process before it starts."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

FATAL_SEED = 666


def fail_on_fatal_seed() -> None:
    """A step fails that runs a request with this seed."""
    from parrot_sys.engine.core import Engine

    step = Engine.step

    def failing(self: Engine) -> Any:
        if any(own.request.sampling.seed == FATAL_SEED for own in self._answers.values()):
            raise RuntimeError("a fault that the test asked for")
        return step(self)

    Engine.step = failing  # type: ignore[method-assign]


def block_loop_on_fatal_seed(seconds: float) -> None:
    """A request with this seed blocks the server's event loop for so long."""
    from parrot_sys.serving.driver import EngineDriver

    submit = EngineDriver.submit

    async def blocking(self: EngineDriver, requests: Any, prompt_rows: Any) -> Any:
        if any(own.sampling.seed == FATAL_SEED for own in requests):
            time.sleep(seconds)
        return await submit(self, requests, prompt_rows)

    EngineDriver.submit = blocking  # type: ignore[method-assign]


def hold_pictures(gate: str, seconds: float) -> None:
    """Pictures are only decoded once the file `gate` is there, and those of a request take at least so long."""
    from parrot_sys.serving.images import PictureReader

    read = PictureReader.read

    def waiting(self: PictureReader, urls: list[tuple[str, str]], size: int) -> Any:
        while urls and not Path(gate).exists():
            time.sleep(0.01)
        time.sleep(seconds if urls else 0)
        return read(self, urls, size)

    PictureReader.read = waiting  # type: ignore[method-assign]


def slow_steps(seconds: float) -> None:
    """Each step takes at least so long."""
    from parrot_sys.engine.core import Engine

    step = Engine.step

    def slow(self: Engine) -> Any:
        time.sleep(seconds)
        return step(self)

    Engine.step = slow  # type: ignore[method-assign]


def small_send_buffers() -> None:
    """Connections that the server accepts hold few bytes that nobody has read: they inherit this of the listener."""
    create = socket.create_server

    def small(*args: Any, **kwargs: Any) -> socket.socket:
        listener = create(*args, **kwargs)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        return listener

    socket.create_server = small


def few_descriptors(count: int) -> None:
    """The process may have so many files and connections open."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
