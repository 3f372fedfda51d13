"""Takes connections in a thread of its own, which answers `GET /health` itself and hands all others to the server.

The server's event loop also writes streams and reads bodies, and a fault may block it; who asks for `/health` decides
whether a process is killed, so the answer must not wait for that. The first bytes of a connection are looked at, not
read: what is no question for `/health` reaches the server as it came. Such a connection is closed with its answer, so
that the next question comes here again; later requests on a connection of the server are answered by its own route.

Connections that say nothing are closed after a time, and those that have said nothing for the longest before that when
there are too many: they must not use up the descriptors that the question needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import socket
import threading
from collections.abc import Callable, Mapping

_QUESTION = b"GET /health"
_ENDS = (b" ", b"?")
_HEAD_END = b"\r\n\r\n"
_MOST_HEAD = 2**14
_SECONDS = 5.0
"""Longest time for the rest of the head of a question."""
_RETRY_SECONDS = 0.1


class Acceptor:
    """Accepts the connections of a listener."""

    def __init__(
        self,
        listener: socket.socket,
        is_healthy: Callable[[], bool],
        hand_over: Callable[[socket.socket], None],
        *,
        seconds: float,
        most_silent: int,
    ) -> None:
        """
        Args:
            listener: is closed at the end.
            is_healthy: whether requests are answered; called by the thread.
            hand_over: takes a connection that asks for something else; called by the thread.
            seconds: in which a connection must say something.
            most_silent: connections that have said nothing yet.
        """
        self._listener = listener
        self._is_healthy = is_healthy
        self._hand_over = hand_over
        self._seconds = seconds
        self._most_silent = most_silent
        self._silent: dict[socket.socket, asyncio.Task[None]] = {}  # the oldest first
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
            await asyncio.sleep(0)  # it looks for bytes before the next connection is taken

    async def _sort(self, connection: socket.socket) -> None:
        """Answers a connection or hands it over."""
        try:
            begin = await self._begin(connection)
            if not (begin.startswith(_QUESTION) and begin.endswith(_ENDS)):
                self._hand_over(connection)
                return
            with connection:
                async with asyncio.timeout(min(_SECONDS, self._seconds)):
                    await self._answer(connection)
        except (OSError, TimeoutError):
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise

    async def _begin(self, connection: socket.socket) -> bytes:
        """The first bytes that a connection says; none when the client has left."""
        count = len(_QUESTION) + 1
        with contextlib.suppress(BlockingIOError):
            return connection.recv(count, socket.MSG_PEEK)
        if len(self._silent) >= self._most_silent:
            self._silent.pop(next(iter(self._silent))).cancel()
        task = asyncio.current_task()
        assert task is not None, "the loop runs it"
        self._silent[connection] = task
        try:
            async with asyncio.timeout(self._seconds):
                await self._readable(connection)
        finally:
            self._silent.pop(connection, None)
        return connection.recv(count, socket.MSG_PEEK)

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
        await self._loop.sock_sendall(connection, raw_answer(status, body))


def raw_answer(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """An answer with a body of JSON, after which the connection is closed."""
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + _HEAD_END + body


def health_body(*, healthy: bool) -> bytes:
    """The body of an answer."""
    return json.dumps({"status": "ok" if healthy else "dead"}).encode()
