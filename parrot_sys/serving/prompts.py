"""From the body of a request to requests of the engine. For worker threads: tokenises, and decodes pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample
from parrot_sys.data.picture import join_pictures
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.requests import EngineRequest, picture_digests
from parrot_sys.engine.sampler import SamplingParams
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.inputs import first_answer_after
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.inference.requests import check_rows, free_rows, num_rows
from parrot_sys.serving.config import ServeConfig
from parrot_sys.serving.errors import ApiError, as_api_error, wrong
from parrot_sys.serving.images import PictureReader
from parrot_sys.serving.parsing import parse
from parrot_sys.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Message,
    Sampling,
    TokenizeRequest,
)
from parrot_sys.serving.remote import RemoteFetcher
from parrot_sys.serving.token_texts import TokenTexts

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and the requests for its answers, one for each choice."""

    ids: list[int]
    rows: int
    """Rows that it takes with its pictures: what usage counts as its tokens."""
    requests: list[EngineRequest]
    pieces: list[str]
    """Text that each of its ids completes, where the answer repeats it."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its pictures as the model takes them."""
        pixels = self.requests[0].sample.pixel_values
        return 0 if pixels is None else pixels.nbytes


class Preparer:
    """Makes requests of the engine."""

    def __init__(self, model: ParrotForConditionalGeneration, processor: ParrotProcessor, config: ServeConfig) -> None:
        """
        Args:
            model: to be asked.
            processor: of the model.
            config: limits.
        """
        self._model = model.config
        self._ends = frozenset(model.eos_token_ids)
        self._answer_header = model.answer_header
        self._processor = processor.with_image_limits(config.image_limits)
        self._config = config
        self._max_queue = config.engine.scheduler.max_queue
        self._name = config.name or config.checkpoint.resolve().name
        remote = RemoteFetcher(config.remote) if config.remote.enabled else None
        self._pictures = PictureReader(self._processor, config.engine.limits, remote)
        self._processor.encode_text("")  # what encoding needs is made now, by one thread; says if there is no tokenizer
        self.texts = TokenTexts(processor.tokenizer)
        """Texts of tokens."""
        self._opening: list[int] = list(processor.tokenizer("")["input_ids"])

    @property
    def name(self) -> str:
        """Name of the model in the interface."""
        return self._name

    @property
    def max_rows(self) -> int:
        """Longest request in rows, with its answer."""
        engine = self._config.engine
        return min(self._model.max_rows, engine.num_blocks * engine.block_size)

    def chat(self, body: bytes) -> tuple[ChatRequest, list[Prompt]]:
        """A request to `/v1/chat/completions`.

        Raises:
            ApiError: it is wrong, or larger than the limits.
        """
        request = parse(ChatRequest, body)
        self._check_model(request.model)
        ids, urls = self._conversation(request.messages)
        most = self._model.most_images
        if most is not None and len(urls) > most:
            raise wrong(f"pictures of a request must be <= {most} for this model, got {len(urls)}", urls[most][1])
        pictures = self._pictures.read(urls, len(body))
        pixels, rows = join_pictures(pictures)
        most = self._config.max_pixel_bytes
        if pixels is not None and pixels.nbytes > most:
            message = f"pictures may take at most {most} bytes for the model (max_pixel_bytes), got {pixels.nbytes}"
            raise ApiError(413, f"{message}: send fewer", param="messages", code="request_too_large")
        first = first_answer_after(ids, self._answer_header)
        sample = Sample(input_ids=ids, pixel_values=pixels, pictures=rows, first_answer=first)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        limit = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        prompt = self._prompt(request, sample, limit, logprobs)
        if request.parrot_routing:
            prompt.requests[0] = replace(prompt.requests[0], routes=True)
        return request, [prompt]

    def completion(self, body: bytes) -> tuple[CompletionRequest, list[Prompt]]:
        """A request to `/v1/completions`; errors as `chat`."""
        request = parse(CompletionRequest, body)
        self._check_model(request.model)
        given: Any = request.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        prompts: list[Any] = given if several else [given]
        self._check_choices(len(prompts) * (request.n or 1), "prompt" if several else "n")
        echoed = (request.logprobs or 0) if request.echo and request.logprobs is not None else None
        made = []
        for place, prompt in enumerate(prompts):
            name = f"prompt[{place}]" if several else "prompt"
            if isinstance(prompt, str):
                ids = self._text_ids(prompt, name, request.add_special_tokens)
            else:
                ids = self._checked_ids(prompt, name)
            made.append(
                self._prompt(
                    request,
                    Sample(input_ids=ids),
                    request.max_tokens,
                    request.logprobs,
                    prompt_logprobs=echoed,
                    pieces=self.texts.pieces(ids) if request.echo else [],
                )
            )
        return request, made

    def tokenize(self, body: bytes) -> list[int]:
        """Ids of a request to `/tokenize`, an image as one id; errors as `chat`."""
        request = parse(TokenizeRequest, body)
        self._check_model(request.model)
        if request.prompt is not None:
            return self._text_ids(request.prompt, "prompt", request.add_special_tokens, fill=False)
        assert request.messages is not None, "there is either of them"
        return self._conversation(request.messages, add_generation_prompt=request.add_generation_prompt)[0]

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuses ids that are no tokens of the vocabulary.

        Raises:
            ApiError: names the first.
        """
        size = self._model.llm.vocab_size
        for place, token in enumerate(ids):
            if token >= size:
                raise wrong(f"token ids must be below {size}, got {token}", f"{param}[{place}]")

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        self.check_ids(ids, param)
        marker = self._model.image_token_id
        if marker is not None and marker in ids:
            raise wrong(
                f"token {marker} stands for a picture, which a prompt of ids cannot have",
                f"{param}[{ids.index(marker)}]",
            )
        return ids

    def _check_model(self, name: str) -> None:
        if name not in ("", self._name):
            raise ApiError(
                404, f"there is no model {name!r} here, only {self._name!r}", param="model", code="model_not_found"
            )

    def _text_ids(self, text: str, param: str, special: bool, *, fill: bool = True) -> list[int]:
        try:
            ids = [*(self._opening if special else []), *self._processor.encode_text(text)]
        except DataError as error:
            raise wrong(str(error), param) from None
        # Something has to come before the first token of an answer.
        return ids or (sorted(self._ends)[:1] or [0] if fill else [])

    def _conversation(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[list[int], list[tuple[str, str]]]:
        """Ids of a conversation, and the addresses of its pictures with their places in the request."""
        turns: list[dict[str, Any]] = []
        urls: list[tuple[str, str]] = []
        for index, message in enumerate(messages):
            value: list[dict[str, str]] = []
            parts = [message.content] if isinstance(message.content, str) else message.content
            for place, part in enumerate(parts):
                if isinstance(part, ImagePart):
                    urls.append((part.image_url.url, f"messages[{index}].content[{place}].image_url.url"))
                    value.append({"type": "image"})
                    continue
                text = part if isinstance(part, str) else part.text
                after_text = value and value[-1]["type"] == "text"
                value.append({"type": "text", "text": f"\n{text}" if after_text else text})
            turns.append({"from": _ROLES[message.role], "value": value})
        try:
            encoded = self._processor.format_conversation(turns, add_generation_prompt=add_generation_prompt)
        except DataError as error:
            raise wrong(str(error), "messages") from None
        ids: list[int] = encoded["input_ids"]
        assert ids.count(IMAGE_TOKEN_ID) == len(urls), "no text stands for a picture"
        return ids, urls

    def _check_choices(self, count: int, param: str) -> None:
        """Refuses more answers than the server ever takes together: the queue takes all of a request or none."""
        limits = {"max_choices": self._config.max_choices, "engine.scheduler.max_queue": self._max_queue}
        for name, limit in limits.items():
            if count > limit:
                raise wrong(f"a request may have at most {limit} answers in all ({name}), got {count}", param)

    def _prompt(
        self,
        request: Sampling,
        sample: Sample,
        limit: int | None,
        logprobs: int | None,
        *,
        prompt_logprobs: int | None = None,
        pieces: Sequence[str] = (),
    ) -> Prompt:
        count = request.n or 1
        self._check_choices(count, "n")
        rows = num_rows(self._model, sample)
        room = min(free_rows(self._model, sample), self.max_rows - rows)
        try:
            check_rows(self._model, [sample], [1 if limit is None else limit])
        except DataError as error:
            raise wrong(str(error), None, "context_length_exceeded") from None
        self.check_ids(request.stop_token_ids or [], "stop_token_ids")
        new = max(room, 1) if limit is None else limit
        if not new and prompt_logprobs is None:
            prompt_logprobs = 0  # (nothing is asked for but the prompt itself)
        ends = frozenset() if request.ignore_eos else self._ends
        digests = picture_digests(sample)  # here, where no stream waits for it
        requests = [
            EngineRequest(
                sample=sample,
                max_new_tokens=new,
                sampling=_sampling(request, choice),
                stop_ids=ends | frozenset(request.stop_token_ids or ()),
                stop_strings=request.stops,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                deadline=time.monotonic() + self._config.request_seconds,
                salt=(request.cache_salt or "").encode(),
                digests=digests,
            )
            for choice in range(count)
        ]
        return Prompt(ids=sample.input_ids, rows=rows, requests=requests, pieces=list(pieces))


def _sampling(request: Sampling, choice: int) -> SamplingParams:
    """Settings of one of the answers."""
    given = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": None if request.seed is None else request.seed + choice,
    }
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ConfigError as error:
        raise as_api_error(error, str(error).split(" ")[0]) from None
