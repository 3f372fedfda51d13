"""Passes a request on to another server, and its answer back, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import h11
from starlette.types import Receive, Scope, Send

from parrot_sys.serving.http import gone, until

HOST = "127.0.0.1"
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"})
_CHUNK = 2**16


async def exchange(port: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a request to a server of this machine, and its answer back.

    The answer is read while the request is sent: a server may refuse it before it is whole.

    Args:
        port: of the server.
        scope: of the request.
        receive: gives its body.
        send: takes the answer.

    Raises:
        ClientDisconnect: nobody waits for the answer any more.
        OSError: the server cannot be reached, or ended within its answer.
        h11.RemoteProtocolError: the server does not speak HTTP.
    """
    loop = asyncio.get_running_loop()
    # A socket, no stream: what a server sent before it closed can be read when writing has failed already.
    with socket.socket() as own:
        own.setblocking(False)
        await loop.sock_connect(own, (HOST, port))
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = h11.Connection(h11.CLIENT)

        async def ask() -> None:
            with contextlib.suppress(OSError):  # the answer, or that there is none, says why
                if not await _send(own, connection, scope, receive):
                    return
            await gone(receive)

        await until(ask(), _answer(own, connection, send))


async def _send(own: socket.socket, connection: h11.Connection, scope: Scope, receive: Receive) -> bool:
    """Sends a request; false when its sender has left."""
    loop = asyncio.get_running_loop()
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    # The connection is kept: a server that closes it while a body still comes loses the answer on its way.
    headers = [each for each in scope["headers"] if each[0] not in _HOP_BY_HOP and each[0] != b"expect"]
    if not any(name == b"host" for name, _ in headers):
        headers.append((b"host", HOST.encode()))
    request = h11.Request(method=scope["method"], target=target, headers=headers)
    await loop.sock_sendall(own, connection.send(request) or b"")
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        more = message.get("more_body", False)
        data = connection.send(h11.Data(data=message.get("body", b""))) or b""
        await loop.sock_sendall(own, data + (b"" if more else connection.send(h11.EndOfMessage()) or b""))
    return True


async def _answer(own: socket.socket, connection: h11.Connection, send: Send) -> None:
    loop = asyncio.get_running_loop()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await loop.sock_recv(own, _CHUNK))
        elif isinstance(event, h11.Response):
            headers = [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]
            headers = [each for each in headers if each[0] != b"transfer-encoding"]
            await send({"type": "http.response.start", "status": event.status_code, "headers": headers})
        elif isinstance(event, h11.Data):
            await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        elif isinstance(event, h11.EndOfMessage):
            await send({"type": "http.response.body", "body": b""})
            return
        elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError("the server ended within its answer")
