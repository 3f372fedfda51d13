"""A server of OpenAI's interface that answers what a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"data": [{"id": "the-model"}]}
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@dataclass
class Stub:
    """What was asked so far."""

    url: str = ""
    keys: list[str | None] = field(default_factory=list)
    """`Authorization` of each request."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of requests for an answer."""


def completion(text: str | None) -> tuple[int, Any]:
    """An answer of this text."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def refusal(status: int, message: str, code: str | None = None) -> tuple[int, Any]:
    """An error."""
    return status, {"error": {"message": message, "code": code}}


@contextlib.contextmanager
def stub(answer: Answer, models: tuple[int, Any] = (200, MODELS)) -> Iterator[Stub]:
    """Runs the server.

    Args:
        answer: status and content of what comes back for the body of a request; texts go out as they are.
        models: the same for the list of models.
    """
    seen = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.bodies.append(body)
            self._send(*answer(body))

        def log_message(self, *_: Any) -> None:
            """Nothing."""

        def _send(self, status: int, content: Any) -> None:
            seen.keys.append(self.headers["Authorization"])
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
