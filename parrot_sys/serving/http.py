"""The surroundings of the routes: bodies with limits, streams that notice who has left, keys, facts for the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parrot_sys.serving.errors import ApiError

T = TypeVar("T")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LONGEST_METHOD, _LONGEST_PATH = 32, 256
"""Characters of what a client names that go into the log."""
_KEYED = ("/v1/", "/tokenize", "/detokenize")
_PAGE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)


def error_response(error: ApiError) -> Response:
    """The answer with an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def facts_of(scope: Scope) -> dict[str, Any]:
    """Facts about a request, for log and metrics; whoever answers it adds to them."""
    facts: dict[str, Any] = scope["state"]["facts"]
    return facts


async def gone(receive: Receive) -> None:
    """Returns when nobody waits for the answer any more; what is left of the request's body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until(left: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when `left` returns.

    Raises:
        ClientDisconnect: that is so.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left)
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            leaving.result()
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when nobody waits for it any more; the request's body has been read.

    Raises:
        ClientDisconnect: that is so.
    """
    return await until(gone(receive), work)


class EventStream(Response):
    """Server-sent events; a reader who leaves ends their source, one who is slow makes it wait."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], close: Callable[[], None]) -> None:
        """
        Args:
            chunks: data of the events.
            close: called at the end, also when no event was asked for.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_disconnect(receive, self._write(send))
        except ClientDisconnect:
            facts_of(scope)["disconnected"] = True
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        try:
            async for chunk in self._chunks:
                # (Not as UTF-8: clients split lines at U+2028 and its like.)
                await self._event(send, json.dumps(chunk, separators=(",", ":")))
        finally:
            await self._chunks.aclose()
        await self._event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _event(self, send: Send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


class HeldBytes:
    """Bytes that requests hold at the same time, within a limit."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: of all together.
        """
        self._limit = limit
        self.count = 0
        """Bytes that are held."""

    def take(self, count: int) -> None:
        """Holds more.

        Raises:
            ApiError: 429, when too much is held for others.
        """
        if self.count + count > self._limit:
            message = "the server holds as many requests as it can: try again later"
            raise ApiError(429, message, code="too_many_bytes", headers={"Retry-After": "1"})
        self.count += count

    def give_back(self, count: int) -> None:
        """Holds less."""
        self.count -= count


class BodyReader:
    """Reads bodies of requests, each and all together within limits."""

    def __init__(self, *, max_bytes: int, max_pending: int, seconds: float) -> None:
        """
        Args:
            max_bytes: of one body.
            max_pending: of all that are held.
            seconds: longest time in which a body arrives.
        """
        self._max_bytes = max_bytes
        self._pending = HeldBytes(max_pending)
        self._seconds = seconds

    @contextmanager
    def held(self) -> Iterator[Callable[[Request], Awaitable[bytes]]]:
        """Gives the function that reads a body; what it has read counts as held until the end.

        Raises:
            ApiError: 408, 413, 415; 429 when too much is held for others.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            self._pending.take(count)
            taken += count

        try:
            yield lambda request: self._read(request, take)
        finally:
            self._pending.give_back(taken)

    async def _read(self, request: Request, take: Callable[[int], None]) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be JSON (Content-Type: application/json)", code="unsupported_media_type")
        try:
            async with asyncio.timeout(self._seconds):
                return await self._collect(request, take)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None

    async def _collect(self, request: Request, take: Callable[[int], None]) -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self._max_bytes:
                take(len(chunk))
                body += chunk
            elif size > 2 * self._max_bytes:
                break  # (until then it is read and dropped: some clients only look for an answer when they have sent)
        if size > self._max_bytes:
            message = f"a request may have at most {self._max_bytes} bytes (max_bytes): shorten it"
            raise ApiError(413, message, code="request_too_large")
        return bytes(body)


class Guard:
    """ASGI middleware: adds headers, counts and logs each request."""

    def __init__(self, app: ASGIApp, *, on_answer: Callable[[dict[str, Any]], None]) -> None:
        """
        Args:
            app: the routes.
            on_answer: takes the facts about each request, for log and metrics.
        """
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        facts = {
            "id": _request_id(headers.get(b"x-request-id", b"")),
            "method": scope["method"][:_LONGEST_METHOD],
            "path": scope["path"][:_LONGEST_PATH],
            "status": 499,  # until an answer begins
        }
        start = time.monotonic()
        scope.setdefault("state", {})["facts"] = facts

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                own = [(b"x-request-id", facts["id"].encode()), *_PAGE_HEADERS]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            facts["seconds"] = round(time.monotonic() - start, 4)
            route = scope.get("route")
            facts["route"] = getattr(route, "path", None) or "other"
            self._on_answer(facts)


class KeyCheck:
    """ASGI middleware: asks for a key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        """
        Args:
            app: the routes.
            keys: of which requests must bring one; none: nothing is asked for.
        """
        self._app = app
        self._keys = [_hashed(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or refuses it."""
        app = self._app if self._may(scope) else error_response(_UNAUTHORIZED)
        await app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return True
        headers = dict(scope["headers"])
        if not self._keys or not scope["path"].startswith(_KEYED) or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # All are compared, so that the time says nothing about which one was close.
        matches = [hmac.compare_digest(given, own) for own in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


_UNAUTHORIZED = ApiError(
    401,
    "a valid key is needed (Authorization: Bearer KEY)",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
