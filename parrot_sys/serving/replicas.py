"""Several copies of a model behind one port: each is a `parrot serve` of its own, and requests go to the least loaded.

This process holds no model. It passes bytes on as they come, so a slow reader slows its own replica's stream and a
client that leaves is seen there. A replica that ends is started again; meanwhile the others answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from parrot_sys import platform
from parrot_sys.processes import end_with_parent
from parrot_sys.serving.errors import ApiError
from parrot_sys.serving.http import error_response, until_disconnect
from parrot_sys.serving.process import Server, log, settings_of

_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"})
_CHUNK = 2**16
_RESTART_SECONDS = 1.0
_HOST = "127.0.0.1"


@dataclass(kw_only=True)
class Replica:
    """One copy of the model."""

    number: int
    port: int | None = None
    """Where it listens; None until it is ready."""
    load: int = 0
    """Requests that it answers."""
    process: asyncio.subprocess.Process | None = None


class Replicas:
    """ASGI application in front of replicas."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        """
        Args:
            command: starts a replica, which listens on a port that it names in its log.
            count: of replicas.
        """
        self._command = command
        self._replicas = [Replica(number=number) for number in range(count)]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def is_ready(self) -> bool:
        """Whether a replica answers."""
        return any(own.port is not None for own in self._replicas)

    async def start(self) -> None:
        """Starts all replicas; returns when each is ready."""
        ready = [asyncio.Event() for _ in self._replicas]
        self._tasks = [
            asyncio.create_task(self._keep(replica, event.set))
            for replica, event in zip(self._replicas, ready, strict=True)
        ]
        waiting = [asyncio.create_task(event.wait()) for event in ready]
        done, _ = await asyncio.wait([*self._tasks, *waiting], return_when=asyncio.FIRST_COMPLETED)
        while not all(event.is_set() for event in ready):
            if any(task in done for task in self._tasks):
                await self.stop()
                raise RuntimeError("a replica did not start; its message is above")
            done, _ = await asyncio.wait(
                [*self._tasks, *(task for task in waiting if not task.done())], return_when=asyncio.FIRST_COMPLETED
            )

    async def stop(self) -> None:
        """Asks all replicas to end, and waits for them."""
        self._stopping = True
        for replica in self._replicas:
            if replica.process is not None and replica.process.returncode is None:
                replica.process.terminate()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or tells how all replicas are."""
        if scope["type"] != "http":
            return
        ready = [own for own in self._replicas if own.port is not None]
        if scope["path"] == "/metrics" and ready:
            texts = await asyncio.gather(*(self._metrics(own) for own in ready))
            headers = [(b"content-type", b"text/plain; version=0.0.4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": joined_metrics(texts).encode()})
            return
        if not ready:
            await error_response(ApiError(503, "no replica is ready", code="engine_dead"))(scope, receive, send)
            return
        replica = min(ready, key=lambda own: own.load)
        replica.load += 1
        try:
            await self._forward(replica, scope, receive, send)
        finally:
            replica.load -= 1

    async def _keep(self, replica: Replica, on_ready: Callable[[], None]) -> None:
        """Runs a replica, again when it has ended; ends with one that was never ready."""
        while not self._stopping:
            device = ["--device", f"cuda:{replica.number}"] if platform.cuda_available() else []
            replica.process = await asyncio.create_subprocess_exec(
                *self._command, *device, stderr=asyncio.subprocess.PIPE, preexec_fn=end_with_parent
            )
            was_ready = False
            assert replica.process.stderr is not None, "it was asked for"
            async for line in replica.process.stderr:
                replica.port = _port_of(line) or replica.port
                if replica.port is not None and not was_ready:
                    was_ready = True
                    on_ready()
                sys.stderr.write(line.decode(errors="replace"))
            replica.port = None
            code = await replica.process.wait()
            if self._stopping or not was_ready:
                return
            log("replica_ended", replica=replica.number, code=code)
            await asyncio.sleep(_RESTART_SECONDS)

    async def _metrics(self, replica: Replica) -> tuple[int, str]:
        got = bytearray()

        async def collect(message: Message) -> None:
            got.extend(message.get("body", b""))

        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def nothing() -> Message:
            # After the body no message ever comes: nobody leaves.
            return body.pop() if body else await asyncio.get_running_loop().create_future()

        request = {"type": "http", "method": "GET", "raw_path": b"/metrics", "query_string": b"", "headers": []}
        with contextlib.suppress(OSError, h11.RemoteProtocolError):
            await self._exchange(replica, request, nothing, collect)
        return replica.number, got.decode()

    async def _forward(self, replica: Replica, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._exchange(replica, scope, receive, tell)
        except ClientDisconnect:
            return
        except (OSError, h11.RemoteProtocolError):
            if begun:
                raise  # (the server closes the connection: the client sees that the answer is not whole)
            error = ApiError(503, "the replica has failed: try again", code="engine_dead", headers={"Retry-After": "1"})
            await error_response(error)(scope, receive, send)

    async def _exchange(self, replica: Replica, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends a request to a replica and its answer back."""
        reader, writer = await asyncio.open_connection(_HOST, replica.port)
        try:
            connection = h11.Connection(h11.CLIENT)
            target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
            headers = [own for own in scope["headers"] if own[0] not in _HOP_BY_HOP] + [(b"connection", b"close")]
            if not any(name == b"host" for name, _ in headers):
                headers.append((b"host", _HOST.encode()))
            writer.write(connection.send(h11.Request(method=scope["method"], target=target, headers=headers)) or b"")
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                writer.write(connection.send(h11.Data(data=message.get("body", b""))) or b"")
                await writer.drain()
                if not message.get("more_body"):
                    break
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await _answer(connection, reader, receive, send)
        finally:
            writer.close()


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader, receive: Receive, send: Send) -> None:
    async def relay() -> None:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                headers = [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]
                headers = [own for own in headers if own[0] != b"transfer-encoding"]
                await send({"type": "http.response.start", "status": event.status_code, "headers": headers})
            elif isinstance(event, h11.Data):
                await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage):
                await send({"type": "http.response.body", "body": b""})
                return
            elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("the replica ended within its answer")

    await until_disconnect(receive, relay())


def _port_of(line: bytes) -> int | None:
    """Port that a line of a replica's log names."""
    if line.startswith(b"{") and (facts := json.loads(line))["event"] == "ready":
        return int(facts["url"].rsplit(":", 1)[1])
    return None


def joined_metrics(texts: Iterable[tuple[int, str]]) -> str:
    """Metrics of all replicas in the text form of Prometheus, each with the number of its replica as label `engine`."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for number, text in texts:
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP"):
                head, lines = families.setdefault(line.split(" ")[2], ([], []))
                head[:] = [line]
            elif line.startswith("#"):
                head[1:] = [line]
            else:
                name, value = line.rsplit(" ", 1)
                name, _, labels = name.partition("{")
                lines.append(f'{name}{{engine="{number}"{f",{labels}" if labels else "}"} {value}')
    return "\n".join(line for head, lines in families.values() for line in (*head, *lines)) + "\n"


def serve_replicas(argv: Sequence[str], count: int, listener: socket.socket, *, drain_seconds: float) -> int:
    """Serves with `count` replicas until the process is asked to end.

    Args:
        argv: of `parrot serve`.
        count: of replicas.
        listener: takes connections.
        drain_seconds: time in which answers may end.
    """
    command = [sys.executable, "-m", "parrot_sys", "serve", *argv, "--replicas", "1", "--host", _HOST, "--port", "0"]
    replicas = Replicas(command, count)

    async def run() -> int:
        await replicas.start()
        settings = uvicorn.Config(replicas, **settings_of(drain_seconds))
        facts = {"replicas": count}
        server = Server(settings, listener, facts=facts, is_healthy=lambda: replicas.is_ready)
        await server.serve([listener])
        await replicas.stop()
        return 0

    return asyncio.run(run())
