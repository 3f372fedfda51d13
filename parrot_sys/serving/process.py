"""A server as a process: its signals, its settings, its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

_KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep a connection: else they send requests into one that just closed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def settings_of(drain_seconds: float) -> dict[str, Any]:
    """Settings of uvicorn, with the time in which answers may end."""
    return {
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": _KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": int(drain_seconds) + 5,
    }


class Server(uvicorn.Server):
    """Says when it is ready, and ends in order when it is asked to."""

    def __init__(self, settings: uvicorn.Config, listener: socket.socket, *, facts: Mapping[str, Any]) -> None:
        """
        Args:
            settings: of uvicorn.
            listener: takes connections.
            facts: for the log, when it is ready.
        """
        super().__init__(settings)
        self._listener = listener
        self._facts = facts

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
        """Listens."""
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        log("ready", url=f"http://{address}:{port}", pid=os.getpid(), **self._facts)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests; those that are there may end."""
        log("draining")
        await super().shutdown(sockets)


def log(event: str, **facts: Any) -> None:
    """One line of JSON on standard error."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()
