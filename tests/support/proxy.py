"""A proxy that keeps its connections to a server: bytes go through as they come, and an end is passed on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def proxy_to(host: str, port: int) -> Iterator[int]:
    """Port of a proxy in front of a server."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def accept() -> None:
        while not closing.is_set():
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                upstream = socket.create_connection((host, port))
                for source, target in ((client, upstream), (upstream, client)):
                    threading.Thread(target=_relay, args=(source, target), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        closing.set()
        listener.close()


def _relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
