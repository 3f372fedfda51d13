"""Takes connections in a thread of its own, which answers `GET /health` itself and hands all others to the server.

The server's event loop also writes streams and reads bodies, and a fault may block it; who asks for `/health` decides
whether a process is killed, so the answer must not wait for that. The first bytes of a connection are looked at, not
read: what is no question for `/health` reaches the server as it came. Such a connection is closed with its answer, so
that the next question comes here again; later requests on a connection of the server are answered by its own route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable

_QUESTION = b"GET /health"
_ENDS = (b" ", b"?")
_HEAD_END = b"\r\n\r\n"
_MOST_HEAD = 2**14
_SECONDS = 5.0
"""Longest time for the rest of the head of a question."""
_RETRY_SECONDS = 0.1
_REASONS = {200: "OK", 503: "Service Unavailable"}


class Acceptor:
    """Accepts the connections of a listener."""

    def __init__(
        self, listener: socket.socket, is_healthy: Callable[[], bool], hand_over: Callable[[socket.socket], None]
    ) -> None:
        """
        Args:
            listener: is closed at the end.
            is_healthy: whether requests are answered; called by the thread.
            hand_over: takes a connection that asks for something else; called by the thread.
        """
        self._listener = listener
        self._is_healthy = is_healthy
        self._hand_over = hand_over
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="accept", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._listener.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """Takes no more connections, and closes those that have asked for nothing yet."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._stopping.wait()
        for task in (accepting, *self._tasks):
            task.cancel()
        await asyncio.gather(accepting, *self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # (too many open files, or a client that has left already)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            task = asyncio.create_task(self._sort(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _sort(self, connection: socket.socket) -> None:
        """Answers a connection or hands it over."""
        try:
            await self._readable(connection)
            begin = connection.recv(len(_QUESTION) + 1, socket.MSG_PEEK)
            if not (begin.startswith(_QUESTION) and begin.endswith(_ENDS)):
                self._hand_over(connection)
                return
            with connection:
                async with asyncio.timeout(_SECONDS):
                    await self._answer(connection)
        except (OSError, TimeoutError):
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    async def _readable(self, connection: socket.socket) -> None:
        """Returns when there are bytes, or the client has left."""
        ready = asyncio.Event()
        self._loop.add_reader(connection, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_reader(connection)

    async def _answer(self, connection: socket.socket) -> None:
        head = bytearray()
        while _HEAD_END not in head and len(head) < _MOST_HEAD:
            data = await self._loop.sock_recv(connection, _MOST_HEAD)
            if not data:
                return
            head += data
        status = 200 if self._is_healthy() else 503
        body = health_body(healthy=status == 200)
        lines = (
            f"HTTP/1.1 {status} {_REASONS[status]}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        await self._loop.sock_sendall(connection, "\r\n".join(lines).encode() + _HEAD_END + body)


def health_body(*, healthy: bool) -> bytes:
    """The body of an answer."""
    return json.dumps({"status": "ok" if healthy else "dead"}).encode()
