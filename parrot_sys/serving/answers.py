"""From pieces of answers to the bodies that OpenAI's interface has, whole or chunk by chunk."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from parrot_sys.engine.detokenizer import Detokenizer
from parrot_sys.engine.requests import Delta
from parrot_sys.engine.sampler import TokenLogprob
from parrot_sys.serving.driver import AnswerStream, EngineDeadError, Piece
from parrot_sys.serving.errors import ApiError, as_api_error
from parrot_sys.serving.metrics import AnswerTimes
from parrot_sys.serving.prompts import Prompt
from parrot_sys.serving.protocol import ChatRequest, CompletionRequest, Sampling
from parrot_sys.serving.token_texts import TokenTexts

Json = dict[str, Any]


def failure_of(delta: Delta) -> ApiError | None:
    """The error that an answer ended with, if it did."""
    if delta.finish_reason == "expired":
        return ApiError(504, "the answer took longer than request_seconds", code="timeout")
    if delta.finish_reason == "error":
        return as_api_error(delta.error or EngineDeadError())
    if delta.finish_reason == "cancelled":
        return EngineDeadError("the answer was cancelled")
    return None


async def merged(streams: Sequence[AnswerStream]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several answers as they come, each with the place of its answer; closes the answers at the end."""
    iterators: list[AsyncIterator[Piece]] = [aiter(stream) for stream in streams]
    waiting = {asyncio.ensure_future(anext(own, None)): place for place, own in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                piece = task.result()
                if piece is not None:
                    yield place, piece
                    waiting[asyncio.ensure_future(anext(iterators[place], None))] = place
    finally:
        for task in waiting:
            task.cancel()
        for stream in streams:
            stream.close()


class Answering(ABC):
    """The answers to one request: n choices of each of its prompts."""

    object: str
    """Name of the kind of a whole answer."""
    chunk_object: str
    """Name of the kind of a chunk."""
    id_prefix: str

    def __init__(
        self,
        request: Sampling,
        prompts: Sequence[Prompt],
        streams: Sequence[AnswerStream],
        *,
        name: str,
        times: Callable[[Prompt, Sequence[AnswerStream]], list[AnswerTimes]],
    ) -> None:
        """
        Args:
            request: as it came.
            prompts: of the request.
            streams: of all choices of the first prompt, then of the next.
            name: of the model.
            times: measures the answers to a prompt.
        """
        self.request = request
        self.prompts = prompts
        self.streams = streams
        self.owners = [prompt for prompt in prompts for _ in prompt.requests]
        """Prompt of each choice."""
        self.completion_tokens = 0
        self.finish_reasons: list[str | None] = [None] * len(streams)
        self._on_close: list[Callable[[], None]] = []
        rest = iter(streams)
        self._times = [own for each in prompts for own in times(each, [next(rest) for _ in each.requests])]
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.object,
            "created": int(time.time()),
            "model": name,
        }

    def on_close(self, call: Callable[[], None]) -> None:
        """Has something done once, when nobody waits for the answers any more."""
        self._on_close.append(call)

    def close(self) -> None:
        """Nobody waits for the answers any more."""
        for stream, times in zip(self.streams, self._times, strict=True):
            stream.close()
            times.end("cancelled")
        while self._on_close:
            self._on_close.pop()()

    def usage(self) -> Json:
        """Counts of tokens."""
        prompt = sum(own.rows for own in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
        }

    async def whole(self) -> Json:
        """All answers together.

        Raises:
            ApiError: one of them failed.
        """
        choices: list[list[Json]] = [[] for _ in self.streams]
        async for place, part in self._parts():
            choices[place].append(part)
        made = [self.join(place, parts) for place, parts in enumerate(choices)]
        return {**self._head, "choices": made, "usage": self.usage(), **self.extras()}

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """The answers chunk by chunk; an error ends them."""
        head = {**self._head, "object": self.chunk_object}
        options = self.request.stream_options
        with_usage = options is not None and options.include_usage
        none: Json = {"usage": None} if with_usage else {}
        parts = self._parts()
        try:
            for first in self.first_chunks():
                yield {**head, "choices": [first], **none}
            extras_due = True
            async for place, part in parts:
                extras = self.extras() if extras_due and place == 0 else {}  # (they are those of the first answer)
                extras_due = extras_due and place != 0
                if not self.is_empty(part) or extras:
                    yield {**head, "choices": [part], **none, **extras}
        except ApiError as error:
            yield error.body()
            return
        finally:
            await parts.aclose()
        if with_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    async def _parts(self) -> AsyncGenerator[tuple[int, Json], None]:
        """Part of a choice that each piece adds, with the place of the choice."""
        pieces = merged(self.streams)
        try:
            async for place, piece in pieces:
                delta = piece.delta
                self._times[place].take(piece)
                if (error := failure_of(delta)) is not None:
                    raise error
                self.completion_tokens += len(delta.tokens)
                self.finish_reasons[place] = delta.finish_reason
                yield place, self.part(place, delta)
        except EngineDeadError:
            for times in self._times:
                times.end("error")
            raise
        finally:
            await pieces.aclose()

    def extras(self) -> Json:
        """Fields besides the choices, once the first piece of the first answer is there."""
        return {}

    def first_chunks(self) -> list[Json]:
        """Chunks before any text."""
        return []

    @abstractmethod
    def part(self, place: int, delta: Delta) -> Json:
        """A choice of a chunk."""

    @abstractmethod
    def is_empty(self, part: Json) -> bool:
        """Whether a chunk would say nothing."""

    @abstractmethod
    def join(self, place: int, parts: Sequence[Json]) -> Json:
        """A whole choice."""


class ChatAnswering(Answering):
    """Answers to `/v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, request: ChatRequest, *args: Any, texts: TokenTexts, extras: Callable[[], Json], **kwargs: Any):
        """
        Args:
            request: as it came.
            args: see `Answering`.
            texts: of tokens.
            extras: further fields, once the first piece is there.
            kwargs: see `Answering`.
        """
        super().__init__(request, *args, **kwargs)
        self._texts = texts
        self._extras = extras
        self._with_logprobs = bool(request.logprobs)

    def extras(self) -> Json:
        """Routes, where they were asked for."""
        return self._extras()

    def first_chunks(self) -> list[Json]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}
            for place in range(len(self.streams))
        ]

    def part(self, place: int, delta: Delta) -> Json:
        """A choice of a chunk."""
        logprobs = {"content": [self._token(each) for each in delta.logprobs]} if self._with_logprobs else None
        content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
        return {"index": place, "delta": content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def is_empty(self, part: Json) -> bool:
        """Whether a chunk would say nothing."""
        logprobs = part["logprobs"]
        return not (part["delta"].get("content") or part["finish_reason"] or (logprobs and logprobs["content"]))

    def join(self, place: int, parts: Sequence[Json]) -> Json:
        """A whole choice."""
        text = "".join(part["delta"].get("content", "") for part in parts)
        logprobs = None
        if self._with_logprobs:
            logprobs = {"content": [each for part in parts for each in part["logprobs"]["content"]], "refusal": None}
        return {
            "index": place,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": self.finish_reasons[place],
        }

    def _token(self, own: TokenLogprob) -> Json:
        entry = self._entry(own.token, own.logprob)
        return {**entry, "top_logprobs": [self._entry(token, value) for token, value in own.top]}

    def _entry(self, token: int, logprob: float) -> Json:
        return {"token": self._texts.text(token), "logprob": logprob, "bytes": list(self._texts.data(token))}


class CompletionAnswering(Answering):
    """Answers to `/v1/completions`."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl"
    request: CompletionRequest

    def __init__(self, request: CompletionRequest, *args: Any, texts: TokenTexts, **kwargs: Any) -> None:
        """
        Args:
            request: as it came.
            args: see `Answering`.
            texts: of tokens.
            kwargs: see `Answering`.
        """
        super().__init__(request, *args, **kwargs)
        self._texts = texts
        self._begun = [False] * len(self.streams)
        self._lengths = [0] * len(self.streams)
        """Characters of each choice that are complete before its next token."""
        self._own = [Detokenizer(texts.tokenizer) for _ in self.streams]

    def part(self, place: int, delta: Delta) -> Json:
        """A choice of a chunk; the first has the prompt, where it is echoed."""
        text, logprobs = "", _Logprobs(self._texts, self.request.logprobs)
        if self.request.echo and not self._begun[place]:
            self._begun[place] = True
            ids, pieces = self.owners[place].ids, self.owners[place].pieces
            text = "".join(pieces)
            if logprobs.wanted:
                for token, piece, own in zip(ids, pieces, [None, *delta.scored], strict=True):
                    logprobs.add(token, own, self._lengths[place])
                    self._lengths[place] += len(piece)
            self._lengths[place] = len(text)
        for own in delta.logprobs:
            logprobs.add(own.token, own, self._lengths[place])
            self._lengths[place] += len(self._own[place].push([own.token]))
        return {
            "index": place,
            "text": text + delta.text,
            "logprobs": logprobs.fields() if logprobs.wanted else None,
            "finish_reason": delta.finish_reason,
        }

    def is_empty(self, part: Json) -> bool:
        """Whether a chunk would say nothing."""
        return not (part["text"] or part["finish_reason"] or (part["logprobs"] and part["logprobs"]["tokens"]))

    def join(self, place: int, parts: Sequence[Json]) -> Json:
        """A whole choice."""
        logprobs = None
        if self.request.logprobs is not None:
            names = _Logprobs(self._texts, 0).fields()
            logprobs = {name: [each for part in parts for each in part["logprobs"][name]] for name in names}
        return {
            "index": place,
            "text": "".join(part["text"] for part in parts),
            "logprobs": logprobs,
            "finish_reason": self.finish_reasons[place],
        }


class _Logprobs:
    """Log-probabilities as `/v1/completions` has them: a list for each property of the tokens."""

    def __init__(self, texts: TokenTexts, count: int | None) -> None:
        self.wanted = count is not None
        self._texts = texts
        self._fields: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }

    def add(self, token: int, own: TokenLogprob | None, offset: int) -> None:
        """A token, with the place where its text begins; the first of a prompt has no log-probability."""
        values: list[Any] = [self._texts.text(token), None, None, offset]
        if own is not None:
            top: dict[str, float] = {}
            for each, value in (*own.top, (own.token, own.logprob)):
                top.setdefault(self._texts.text(each), value)  # (of tokens with the same text the most likely)
            values[1:3] = own.logprob, top
        for entries, value in zip(self._fields.values(), values, strict=True):
            entries.append(value)

    def fields(self) -> dict[str, list[Any]]:
        """The lists."""
        return self._fields
