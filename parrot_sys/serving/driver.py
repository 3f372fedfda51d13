"""EngineDriver: the thread that owns the engine. Requests go in from any thread, pieces of answers come out on a loop.

Nobody else may touch the engine: what is asked of it is a command that this thread runs between two steps. When a step
fails, the engine is dead for good: every answer ends with an error, and no request is taken any more.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from parrot_sys.engine.core import Engine
from parrot_sys.engine.requests import Delta, EngineRequest, RequestImage
from parrot_sys.serving.errors import ApiError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_SECONDS = 5.0
"""Ranks that follow give up when they hear nothing for minutes, and answers that rest have deadlines."""


class EngineDeadError(ApiError):
    """The engine has failed, or has been stopped."""

    def __init__(self, message: str = "the engine has failed") -> None:
        super().__init__(503, message, code="engine_dead")


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta, and when the engine made it."""

    delta: Delta
    time: float
    completes_prompt: bool
    """Whether all rows of the prompt have run with this step."""


class AnswerStream:
    """Pieces of one answer, read on the event loop."""

    def __init__(self, driver: EngineDriver, number: int, prompt_rows: int, limit: int) -> None:
        """
        Args:
            driver: has taken the request; this is its thread.
            number: of the request.
            prompt_rows: of the request.
            limit: pieces that may wait; with more the request is paused until half of them are read.
        """
        self.number = number
        self.images: tuple[RequestImage, ...] = driver.engine.images(number)
        """With routes after the first piece, where they were asked for."""
        self.guidance_ids = driver.engine.guidance_ids(number)
        """Text that guides the routes."""
        self.prompt_rows = prompt_rows
        self.prompt_done = False
        """Whether all rows of the prompt have run."""
        self.queued = time.monotonic()
        """Time when the engine took the request."""
        self.begun: float | None = None
        """Time of the first step that ran rows of it."""
        self._driver = driver
        self._limit = limit
        self._pieces: deque[Piece] = deque()
        self._ready = asyncio.Event()
        self._error: ApiError | None = None
        self._done = False
        self._paused = False

    def put(self, piece: Piece) -> None:
        """Takes a piece; on the loop."""
        self._pieces.append(piece)
        self._ready.set()
        if len(self._pieces) > self._limit and not self._paused and piece.delta.finish_reason is None:
            self._paused = True
            self._driver.pause(self.number)

    def fail(self, error: ApiError) -> None:
        """Ends the answer with an error after the pieces so far; on the loop."""
        self._error = error
        self._ready.set()

    def close(self) -> None:
        """Nobody reads the answer any more."""
        if not self._done:
            self._done = True
            self._driver.forget(self.number)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while not self._done:
            while not self._pieces:
                if self._error is not None:
                    self._done = True
                    raise self._error
                self._ready.clear()
                await self._ready.wait()
            piece = self._pieces.popleft()
            if self._paused and len(self._pieces) <= self._limit // 2:
                self._paused = False
                self._driver.resume(self.number)
            self._done = piece.delta.finish_reason is not None
            yield piece


class EngineDriver:
    """Runs an engine in a thread of its own."""

    def __init__(self, engine: Engine, *, stream_queue: int = 64) -> None:
        """
        Args:
            engine: nobody else calls it from now on.
            stream_queue: pieces of an answer that may wait for its reader.
        """
        self.engine = engine
        self.error: BaseException | None = None
        """Reason why the engine is dead."""
        self.on_step: Callable[[int], None] = lambda tokens: None
        """Called by the thread after each step that added to answers: rows of the prompts that it completed, and tokens
        of answers."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, AnswerStream] = {}
        self._unbegun: dict[int, AnswerStream] = {}
        """Answers of which no row has run."""
        self._limit = stream_queue
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_death: Callable[[], None] = lambda: None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_dead(self) -> bool:
        """Whether the engine takes nothing any more."""
        return self.error is not None

    def start(self, loop: asyncio.AbstractEventLoop, on_death: Callable[[], None] = lambda: None) -> None:
        """Starts the thread.

        Args:
            loop: on which answers are read.
            on_death: called there when the engine has failed.
        """
        self._loop, self._on_death = loop, on_death
        self._thread.start()

    def stop(self, *, seconds: float = 10.0) -> bool:
        """Ends all answers with an error, and the thread; False where it hangs in a step."""
        self._commands.put(self._stop)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end_all(self, message: str) -> None:
        """Ends all answers with an error."""
        self._commands.put(lambda: self._fail_all(EngineDeadError(message)))

    async def submit(self, requests: Sequence[EngineRequest], prompt_rows: Sequence[int]) -> list[AnswerStream]:
        """Takes requests, all or none of them.

        Args:
            requests: to be answered.
            prompt_rows: of each.

        Raises:
            EngineDeadError: the engine is dead.
            ParrotError: see `Engine.submit`.
        """
        future = self._command(lambda: self._submit(requests, prompt_rows))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_all)  # the thread may have taken them already
            raise

    def forget(self, number: int) -> None:
        """Nobody waits for an answer any more."""

        def cancel() -> None:
            if self._streams.pop(number, None) is not None:
                self._unbegun.pop(number, None)
                self.engine.cancel(number)

        self._commands.put(cancel)

    def pause(self, number: int) -> None:
        """Lets an answer rest whose reader is slow."""
        self._commands.put(lambda: self.engine.pause(number))

    def resume(self, number: int) -> None:
        """Lets an answer go on."""
        self._commands.put(lambda: self.engine.resume(number))

    def _command(self, function: Callable[[], T]) -> Future[T]:
        """Result of a function that the thread runs between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if self.is_dead or self._stopping:
            raise EngineDeadError
        self._commands.put(run)
        return future

    def _submit(self, requests: Sequence[EngineRequest], prompt_rows: Sequence[int]) -> list[AnswerStream]:
        if self.is_dead or self._stopping:
            raise EngineDeadError
        streams: list[AnswerStream] = []
        try:
            for request, rows in zip(requests, prompt_rows, strict=True):
                number = self.engine.submit(request)
                streams.append(AnswerStream(self, number, rows, self._limit))
        except BaseException:
            for stream in streams:
                self.engine.cancel(stream.number)
            raise
        taken = {stream.number: stream for stream in streams}
        self._streams |= taken
        self._unbegun |= taken
        return streams

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._run_commands(wait=self.is_dead or not self.engine.has_requests)
                if self.engine.has_requests and not self.is_dead:
                    self._step()
            except BaseException as error:
                logger.exception("the engine has failed")
                self.error = error
                self._fail_all(EngineDeadError())
                self._post(self._on_death)
        self._run_commands(wait=False)

    def _run_commands(self, *, wait: bool) -> None:
        """Runs the commands that are there, or waits for one."""
        try:
            command = self._commands.get(block=wait, timeout=_IDLE_SECONDS)
        except queue.Empty:
            if wait and not self.is_dead:
                self.engine.keep_alive()
                self._step()  # (answers that rest may be past their deadline)
            return
        while True:
            command()
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return

    def _step(self) -> None:
        """Runs the engine once; its answers go to their readers."""
        start = time.monotonic()
        deltas = self.engine.step()
        if self._unbegun:
            ran = {rows.number for rows in self.engine.scheduler.running}
            ran |= {delta.number for delta in deltas if _completes_prompt(delta)}
            for number in ran & self._unbegun.keys():
                self._unbegun.pop(number).begun = start
        self._deliver(deltas)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        now, pieces, tokens = time.monotonic(), [], 0
        for delta in deltas:
            stream = self._streams.get(delta.number)
            if stream is None:
                continue
            if delta.finish_reason is not None:
                del self._streams[delta.number]
                self._unbegun.pop(delta.number, None)
            completes = not stream.prompt_done and _completes_prompt(delta)
            stream.prompt_done |= completes
            tokens += len(delta.tokens) + (stream.prompt_rows if completes else 0)
            pieces.append((stream, Piece(delta, now, completes)))
        if tokens:
            self.on_step(tokens)

        def put_all() -> None:
            for stream, piece in pieces:
                stream.put(piece)

        if pieces:
            self._post(put_all)

    def _fail_all(self, error: ApiError) -> None:
        streams, self._streams, self._unbegun = list(self._streams.values()), {}, {}
        if not self.is_dead:
            for stream in streams:
                self.engine.cancel(stream.number)

        def fail() -> None:
            for stream in streams:
                stream.fail(error)

        self._post(fail)

    def _stop(self) -> None:
        self._stopping = True
        self._fail_all(EngineDeadError("the server stops"))

    def _post(self, function: Callable[[], None]) -> None:
        assert self._loop is not None, "the thread has been started with a loop"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)


def _completes_prompt(delta: Delta) -> bool:
    """Whether all rows of a prompt have run once its first delta is like this: there is a token, or none is wanted."""
    return bool(delta.tokens) or delta.finish_reason == "length"


def _close_all(future: Future[list[AnswerStream]]) -> None:
    if not future.cancelled() and future.exception() is None:
        for stream in future.result():
            stream.close()
