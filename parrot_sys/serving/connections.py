"""Connections of the server: their number, and the time in which each must ask for something, are limited."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from parrot_sys.serving.acceptor import raw_answer
from parrot_sys.serving.errors import ApiError

_RESERVED = 128
"""Descriptors for all else that a process has open, at least."""
_LATE = ApiError(408, "the head of the request did not arrive in time", code="timeout")
_FULL = ApiError(
    503,
    "the server has as many connections as it can: try again later",
    code="too_many_connections",
    headers={"Retry-After": "1"},
)


def most_connections(descriptors: int) -> tuple[int, int]:
    """How many connections may be open, and how many more that have said nothing yet.

    Args:
        descriptors: that one of the former takes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 2**20
    reserved = max(limit // 4, _RESERVED)
    return max((limit - reserved) // descriptors, 1), max(reserved // 2, 1)


def refuse(connection: socket.socket) -> None:
    """Answers a connection that there is no room for, and closes it."""
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.recv(2**16)  # what is left unread would reset the connection, and the answer may be lost
        connection.send(_raw(_FULL))
        connection.shutdown(socket.SHUT_WR)


class Connection(H11Protocol):
    """A connection that is closed when the head of a request is not whole in time.

    The time runs from the start of a connection, later from the first byte of a head; in between uvicorn's own limit of
    idle connections holds. A body that is dropped, as its request was answered before, has the same time.
    """

    def __init__(self, *, head_seconds: float, **rest: Any) -> None:
        """
        Args:
            head_seconds: the time.
            rest: what uvicorn's protocol takes.
        """
        super().__init__(**rest)
        self._head_seconds = head_seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._head_seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._head_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:  # (else a body is dropped: its request has been answered)
            self.transport.write(_raw(_LATE))
        self.transport.close()


def _raw(error: ApiError) -> bytes:
    return raw_answer(error.status, json.dumps(error.body()).encode(), error.headers)
