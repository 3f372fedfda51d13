"""An HTTP/1.1 proxy as it stands in front of servers: it keeps its connections to the server for further requests, of
whichever client, reads a request whole before it passes it on, and closes such a connection when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import h11

_CHUNK = 2**16


@dataclass
class _Peer:
    """One side of a connection."""

    protocol: h11.Connection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def event(self) -> h11.Event | type[h11.PAUSED]:
        """What comes next."""
        while (event := self.protocol.next_event()) is h11.NEED_DATA:
            self.protocol.receive_data(await self.reader.read(_CHUNK))
        return event  # type: ignore[return-value]

    async def send(self, event: h11.Event) -> None:
        """Sends an event."""
        self.writer.write(self.protocol.send(event) or b"")
        await self.writer.drain()


@dataclass
class Proxy:
    """A proxy that runs."""

    host: str
    upstream_port: int
    port: int = 0
    """Where clients connect to it."""
    opened: int = 0
    """Connections to the server that it has opened."""
    requests: int = 0
    """Requests that it has passed on."""
    idle: list[_Peer] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a client until it leaves."""
        client = _Peer(h11.Connection(h11.SERVER), reader, writer)
        with contextlib.closing(writer), contextlib.suppress(OSError, h11.RemoteProtocolError):
            while events := await _request(client):
                answering = asyncio.create_task(self._answer(client, events))
                left = asyncio.create_task(reader.read(1))  # (these clients send nothing before their answer)
                await asyncio.wait((answering, left), return_when=asyncio.FIRST_COMPLETED)
                is_whole = answering.done() and not answering.cancelled() and answering.exception() is None
                for task in (answering, left):
                    task.cancel()
                await asyncio.gather(answering, left, return_exceptions=True)
                if not is_whole:
                    return
                client.protocol.start_next_cycle()

    async def _answer(self, client: _Peer, events: list[h11.Event]) -> None:
        if self.idle:
            server = self.idle.pop()
            server.protocol.start_next_cycle()
        else:
            streams = await asyncio.open_connection(self.host, self.upstream_port)
            server = _Peer(h11.Connection(h11.CLIENT), *streams)
            self.opened += 1
        self.requests += 1
        try:
            for event in events:
                await server.send(event)
            while True:
                answered = await server.event()
                assert isinstance(answered, h11.Response | h11.Data | h11.EndOfMessage), answered
                await client.send(answered)
                if isinstance(answered, h11.EndOfMessage):
                    break
        except BaseException:
            server.writer.close()
            raise
        assert server.protocol.their_state is h11.DONE, "the server keeps the connection"
        self.idle.append(server)


async def _request(client: _Peer) -> list[h11.Event]:
    """The next request with its body; nothing when the client has left."""
    events: list[h11.Event] = []
    while not (events and isinstance(events[-1], h11.EndOfMessage)):
        event = await client.event()
        if isinstance(event, h11.ConnectionClosed) or not isinstance(event, h11.Request | h11.Data | h11.EndOfMessage):
            return []
        events.append(event)
    return events


@contextlib.contextmanager
def proxy_to(host: str, port: int) -> Iterator[Proxy]:
    """A proxy in front of a server, which runs in a thread."""
    proxy, loop = Proxy(host, port), asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    proxy.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
