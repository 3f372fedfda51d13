"""A server as a process: its signals, its settings, its log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from parrot_sys.serving.acceptor import Acceptor
from parrot_sys.serving.connections import Connection, most_connections, refuse

_KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep a connection: else they send requests into one that just closed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def settings_of(drain_seconds: float) -> dict[str, Any]:
    """Settings of uvicorn, with the time in which answers may end."""
    return {
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "http": "h11",
        "ws": "none",
        "server_header": False,
        "timeout_keep_alive": _KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": int(drain_seconds) + 5,
    }


class Server(uvicorn.Server):
    """Says when it is ready, and ends in order when it is asked to."""

    def __init__(
        self,
        settings: uvicorn.Config,
        listener: socket.socket,
        *,
        facts: Mapping[str, Any],
        is_healthy: Callable[[], bool],
        head_seconds: float,
        descriptors: int = 1,
    ) -> None:
        """
        Args:
            settings: of uvicorn.
            listener: takes connections.
            facts: for the log, when it is ready.
            is_healthy: whether requests are answered; a thread of its own asks.
            head_seconds: in which the head of a request must arrive.
            descriptors: of the operating system that a connection takes.
        """
        super().__init__(settings)
        self._listener = listener
        self._facts = facts
        self._is_healthy = is_healthy
        self._head_seconds = head_seconds
        self._most, self._most_silent = most_connections(descriptors)
        self._arriving: set[asyncio.Task[Any]] = set()

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
        """Listens; connections come from the acceptor's thread."""
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()

        def hand_over(connection: socket.socket) -> None:
            loop.call_soon_threadsafe(self._arrive, connection)

        self._acceptor = Acceptor(
            self._listener,
            self._is_healthy,
            hand_over,
            seconds=self._head_seconds,
            most_silent=self._most_silent,
        )
        host, port = self._listener.getsockname()[:2]
        self._acceptor.start()
        address = f"[{host}]" if ":" in host else host
        log("ready", url=f"http://{address}:{port}", pid=os.getpid(), **self._facts)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; those that are there may end."""
        log("draining")
        await asyncio.to_thread(self._acceptor.stop)
        await asyncio.sleep(0)  # what was handed over last arrives
        await asyncio.gather(*self._arriving, return_exceptions=True)
        await super().shutdown(sockets=[])

    def _arrive(self, connection: socket.socket) -> None:
        """A connection from the acceptor."""
        if len(self.server_state.connections) + len(self._arriving) >= self._most:
            refuse(connection)
            return
        task = asyncio.ensure_future(asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _protocol(self) -> asyncio.Protocol:
        return Connection(
            head_seconds=self._head_seconds,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def log(event: str, **facts: Any) -> None:
    """One line of JSON on standard error."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()
