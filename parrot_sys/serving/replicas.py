"""Several copies of a model behind one port: each is a `parrot serve` of its own, and requests go to the least loaded.

This process holds no model. It passes bytes on as they come, so a slow reader slows its own replica's stream and a
client that leaves is seen there. A replica that ends is started again; meanwhile the others answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Iterable, Sequence

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.errors import ApiError
from parrot_sys.serving.forwarding import HOST, exchange
from parrot_sys.serving.http import error_response
from parrot_sys.serving.process import Server, log, settings_of
from parrot_sys.serving.replica import Replica

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
"""Seconds before a replica is started again; they double with each start that fails."""


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
        self._stopping = asyncio.Event()
        self._lost = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether a replica answers."""
        return any(own.port is not None for own in self._replicas)

    @property
    def is_lost(self) -> bool:
        """Whether no replica answers and none could be started again."""
        return self._lost.is_set()

    async def lost(self) -> None:
        """Returns when that is so."""
        await self._lost.wait()

    async def start(self) -> None:
        """Starts all replicas; returns when each is ready.

        Raises:
            RuntimeError: one did not start.
        """
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
        self._stopping.set()
        for replica in self._replicas:
            replica.ask_to_end()
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
        """Runs a replica, again when it has ended; ends with one whose first start fails."""
        wait, is_first = _FIRST_WAIT, True
        while not self._stopping.is_set():
            code: int | None = None
            try:
                code = await replica.run(self._command, on_ready)
            except Exception as error:  # whatever it is, this replica does not answer: the next start may go well
                log("replica_error", replica=replica.number, error=repr(error))
            if self._stopping.is_set() or (is_first and replica.failed):
                return
            wait = min(2 * wait, _LONGEST_WAIT) if replica.failed else _FIRST_WAIT
            log("replica_ended", replica=replica.number, code=code, again_in=wait)
            if all(own.failed for own in self._replicas):
                self._lost.set()
            is_first = False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)

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
            await exchange(replica.port or 0, request, nothing, collect)
        return replica.number, got.decode()

    async def _forward(self, replica: Replica, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await exchange(replica.port or 0, scope, receive, tell)
        except ClientDisconnect:
            return
        except (OSError, h11.RemoteProtocolError):
            if begun:
                raise  # (the server closes the connection: the client sees that the answer is not whole)
            error = ApiError(503, "the replica has failed: try again", code="engine_dead", headers={"Retry-After": "1"})
            await error_response(error)(scope, receive, send)


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


def serve_replicas(argv: Sequence[str], config: ServeConfig, listener: socket.socket) -> int:
    """Serves with replicas until the process is asked to end; 0 then, and 1 when no replica can be started.

    Args:
        argv: of `parrot serve`.
        config: what `argv` says.
        listener: takes connections.
    """
    command = [sys.executable, "-m", "parrot_sys", "serve", *argv, "--replicas", "1", "--host", HOST, "--port", "0"]
    replicas = Replicas(command, config.replicas)

    async def run() -> int:
        await replicas.start()
        settings = uvicorn.Config(replicas, **settings_of(config.drain_seconds))
        server = Server(
            settings,
            listener,
            facts={"replicas": config.replicas},
            is_healthy=lambda: replicas.is_ready,
            head_seconds=config.head_seconds,
            descriptors=2,  # (one more to a replica)
        )
        ending = asyncio.create_task(_end_when_lost(replicas, server))
        await server.serve([listener])
        ending.cancel()
        await replicas.stop()
        if replicas.is_lost:
            log("stopped", reason="no replica could be started again")
        return 1 if replicas.is_lost else 0

    return asyncio.run(run())


async def _end_when_lost(replicas: Replicas, server: Server) -> None:
    await replicas.lost()
    server.should_exit = True
