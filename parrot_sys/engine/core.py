"""The engine: requests of any kind in, pieces of answers out, one step of the model for all of them at a time.

One thread calls it. `submit` and `cancel` take effect with the next `step`, which runs rows of many requests together:
answers that go on, prompts in pieces, texts that are only scored. What a request gets does not depend on the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from parrot_sys.data.packing import Guidance
from parrot_sys.engine.blocks import BlockPool, root_hash
from parrot_sys.engine.config import EngineConfig
from parrot_sys.engine.detokenizer import Detokenizer, StopStrings, TextDecoder
from parrot_sys.engine.encoder_cache import EncoderCache
from parrot_sys.engine.inputs import StepBuilder, StepInputs, build_step
from parrot_sys.engine.pictures import PictureEncoder, PictureModel
from parrot_sys.engine.requests import (
    Delta,
    EngineRequest,
    FinishReason,
    ImageReaders,
    RequestImage,
    expand,
    finite_rows,
    not_finite,
)
from parrot_sys.engine.sampler import RequestSampler, TokenLogprob, next_tokens, token_logprobs
from parrot_sys.engine.scheduler import Chunk, EndReason, ScheduledRequest, Scheduler
from parrot_sys.errors import ConfigError, DataError


class ModelRunner(PictureModel, Protocol):
    """The model as the engine sees it; on several ranks, all of them."""

    @property
    def identity(self) -> bytes:
        """Tells its keys and values from those of other models."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def most_images(self) -> int | None:
        """Most images of a request; None for any number."""

    @property
    def guidance(self) -> Guidance:
        """Which text guides routes."""

    @property
    def guided(self) -> bool:
        """Whether text guides routes at all."""

    @property
    def readers(self) -> ImageReaders:
        """Which rows hold or read an image."""

    @property
    def takes_cache(self) -> bool:
        """Whether keys and values can be kept: not where earlier rows read later ones."""

    def open_cache(self, num_blocks: int, block_size: int) -> None:
        """Makes an empty cache."""

    def keep_alive(self) -> None:
        """Tells ranks that wait that there is more to come."""

    def run_step(self, inputs: StepInputs) -> Tensor:
        """Writes the rows into the cache; returns the logits that are wanted, float32 [K, V]."""

    def run_whole(self, inputs: StepInputs) -> Tensor:
        """The same for whole requests, without a cache."""


class _Answer:
    """A request that is being answered."""

    def __init__(
        self,
        request: EngineRequest,
        rows: ScheduledRequest,
        images: tuple[RequestImage, ...],
        guidance_ids: Tensor,
        sampler: RequestSampler,
        tokenizer: TextDecoder | None,
        known: Sequence[int],
        num_prompt_rows: int,
    ) -> None:
        self.request = request
        self.rows = rows
        self.images = images
        self.guidance_ids = guidance_ids
        self.sampler = sampler
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self.stops = StopStrings(request.stop_strings)
        self.known = known
        """Ids of the prompt's rows and of what was given after it, also the last, which may not have to run."""
        self.num_prompt_rows = num_prompt_rows
        self.scores = bool(request.given) or request.prompt_logprobs is not None
        """Whether any of its rows is scored."""
        self.scored: dict[int, TokenLogprob] = {}
        """Row -> log-probability of its id, of the prompt and what was given after it."""

    def take_scored(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities that no delta has yet, in the order of the rows."""
        scored, self.scored = [self.scored[row] for row in sorted(self.scored)], {}
        return tuple(scored)

    def targets(self, chunk: Chunk) -> list[tuple[int, int, int]]:
        """Rows of a chunk whose next id is scored: place among the wanted logits, row of the next id, the id."""
        if not self.scores:
            return []
        found = []
        for place, row in enumerate(chunk.logits_rows):
            nxt = row + 1
            if nxt >= len(self.known):
                continue
            token = self.known[nxt]
            wanted = nxt >= self.num_prompt_rows or self.request.prompt_logprobs is not None
            if wanted and token >= 0:
                found.append((place, nxt, token))
        return found


class Engine:
    """Continuous batching over a paged cache."""

    def __init__(
        self,
        model: ModelRunner,
        config: EngineConfig,
        *,
        tokenizer: TextDecoder | None = None,
        use_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            model: runs steps. It gets a new cache: no other engine may go on with it.
            config: sizes.
            tokenizer: turns answers into text; needed for stop strings.
            use_cache: False computes whole requests again with every step; so do models that take no cache always,
                and each request by itself.
            clock: for deadlines.
        """
        self.model = model
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.scheduler = Scheduler(config.scheduler, self.pool)
        self.cache = EncoderCache(feature_bytes=config.feature_bytes, routed_bytes=config.routed_bytes)
        self.steps = 0
        """Steps so far."""
        self._builder = StepBuilder(config.block_size)
        self._encoder = PictureEncoder(model, self.cache)
        self._tokenizer = tokenizer
        self._clock = clock
        self._answers: dict[int, _Answer] = {}
        self._count = 0
        self._use_cache = use_cache and model.takes_cache
        if self._use_cache:
            model.open_cache(config.num_blocks, config.block_size)

    @property
    def has_requests(self) -> bool:
        """Whether anything waits or runs."""
        return self.scheduler.has_requests

    def submit(self, request: EngineRequest) -> int:
        """Takes a request; its number is that of its deltas.

        Raises:
            ConfigError: it has stop strings and the engine no tokenizer.
            DataError: it is larger than the limits, or than the cache, or has more images than the model reads.
            BusyError: the queue is full.
        """
        if request.stop_strings and self._tokenizer is None:
            raise ConfigError("stop strings need an engine with a tokenizer")
        model = self.model
        prompt = expand(request, model.rows_per_image, model.guidance, model.readers, guided=model.guided)
        self.config.limits.check(prompt_rows=len(prompt.ids), images=len(prompt.images))
        if model.most_images is not None and len(prompt.images) > model.most_images:
            raise DataError(
                f"pictures of a request must be <= {model.most_images} for this model, got {len(prompt.images)}"
            )
        known, num_prompt_rows = (*prompt.ids, *request.given), len(prompt.ids)
        ids = list(known)
        if not request.max_new_tokens and len(ids) > 1:
            ids.pop()  # nobody wants the logits after it
        first = 0 if request.prompt_logprobs is not None else num_prompt_rows - 1 if request.given else len(ids) - 1
        # Whether a prompt has an image may change all of its rows.
        root = root_hash(model.identity, request.salt + (b"\1" if prompt.images else b"\0"))
        rows = ScheduledRequest(
            number=self._count,
            ids=ids,
            max_new_tokens=request.max_new_tokens,
            root=root,
            pictures=tuple(image.span() for image in prompt.images),
            logits_from=min(first, len(ids) - 1),
            deadline=request.deadline,
        )
        sampler = RequestSampler(request.sampling, ids, model.vocab_size, device=model.device)
        self.scheduler.submit(rows)
        self._answers[self._count] = _Answer(
            request, rows, prompt.images, prompt.guidance_ids, sampler, self._tokenizer, known, num_prompt_rows
        )
        self._count += 1
        return rows.number

    def cancel(self, number: int) -> None:
        """Nobody waits for a request any more: the next step has none of its rows."""
        if number in self._answers:
            self.scheduler.cancel(self._answers[number].rows)

    def pause(self, number: int) -> None:
        """Lets a request rest until `resume`; it holds no blocks meanwhile. Its deadline stays."""
        if number in self._answers:
            self.scheduler.pause(self._answers[number].rows)

    def resume(self, number: int) -> None:
        """Lets a request go on that was paused."""
        if number in self._answers:
            self.scheduler.resume(self._answers[number].rows)

    def keep_alive(self) -> None:
        """To be called now and then while there are no requests, or ranks that wait for one give up."""
        self.model.keep_alive()

    def images(self, number: int) -> tuple[RequestImage, ...]:
        """Images of a request that is being answered, with their routes once its prompt has run."""
        return self._answers[number].images

    def guidance_ids(self, number: int) -> list[int]:
        """Ids of the text that guides the routes of a request's images."""
        ids: list[int] = self._answers[number].guidance_ids.tolist()
        return ids

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Runs the model once; returns what it added to answers.

        Raises:
            Exception: the model failed. All requests of the step are out then, and no cached row is used again.
        """
        step = self.scheduler.schedule(self._clock())
        deltas = []
        for rows, why in step.dropped:
            reason: FinishReason = "cancelled" if why is EndReason.CANCELLED else "expired"
            deltas.append(self._end(self._answers[rows.number], reason))
        if not step.chunks:
            return deltas
        self.steps += 1
        answers = [self._answers[chunk.request.number] for chunk in step.chunks]
        try:
            logits = self._run(step.chunks, answers)
        except BaseException:
            self.scheduler.forget_step()
            for own in answers:
                self._end(own, "error")
            raise
        return deltas + self._after(step.chunks, answers, logits)

    def _run(self, chunks: Sequence[Chunk], answers: Sequence[_Answer]) -> Tensor:
        """Logits of all rows of a step that want them."""
        size = self.config.block_size
        if self._use_cache:
            self._encode(chunks, answers)
            return self.model.run_step(self._builder.build(chunks, [own.images for own in answers]))
        # Whole requests; those of which no logits are wanted yet can wait.
        wanted = [
            (replace(chunk, start=0), own) for chunk, own in zip(chunks, answers, strict=True) if chunk.logits_rows
        ]
        if not wanted:
            return torch.empty(0, self.model.vocab_size)
        self._encode([chunk for chunk, _ in wanted], [own for _, own in wanted])
        groups = [wanted] if self.model.takes_cache else [[each] for each in wanted]
        outputs = [
            self.model.run_whole(build_step([chunk for chunk, _ in group], [own.images for _, own in group], size))
            for group in groups
        ]
        return torch.cat(outputs)

    def _encode(self, chunks: Sequence[Chunk], answers: Sequence[_Answer]) -> None:
        """Makes sure that all images that the rows hold or read are there."""
        needing = [
            own
            for own, chunk in zip(answers, chunks, strict=True)
            if any(
                image.rows is None
                and (own.request.routes or (image.readers.start < chunk.stop and image.readers.stop > chunk.start))
                for image in own.images
            )
        ]
        if needing:
            self._encoder.encode([(own.images, own.guidance_ids, own.request.routing_override) for own in needing])
        for own in needing:
            if own.request.routes and own.request.routing_override is None:
                self._encoder.attend(own.images, own.guidance_ids)

    def _after(self, chunks: Sequence[Chunk], answers: Sequence[_Answer], logits: Tensor) -> list[Delta]:
        """Scores and samples from the logits of a step."""
        deltas, finite = [], finite_rows(logits)
        sampling: list[tuple[_Answer, int]] = []
        scoring: list[tuple[_Answer, int, int, int]] = []
        begin = 0
        for chunk, own in zip(chunks, answers, strict=True):
            count = len(chunk.logits_rows)
            rows = range(begin, begin + count)
            begin += count
            if not all(finite[begin - count : begin]):
                deltas.append(self._end(own, "error", error=not_finite(logits[list(rows)])))
                continue
            scoring += [(own, rows[place], row, token) for place, row, token in own.targets(chunk)]
            self.scheduler.complete(chunk)
            if own.rows.computed == len(own.rows.ids):
                sampling.append((own, rows[-1]))
        self._score(scoring, logits)
        return deltas + self._sample(sampling, logits)

    def _score(self, scoring: Sequence[tuple[_Answer, int, int, int]], logits: Tensor) -> None:
        if not scoring:
            return
        rows = torch.tensor([row for _, row, _, _ in scoring], device=logits.device)
        top = [own.request.prompt_logprobs or own.request.logprobs or 0 for own, *_ in scoring]
        found = token_logprobs(logits.index_select(0, rows), [token for *_, token in scoring], top)
        for (own, _, row, _), logprob in zip(scoring, found, strict=True):
            own.scored[row] = logprob

    def _sample(self, sampling: Sequence[tuple[_Answer, int]], logits: Tensor) -> list[Delta]:
        """The next token of each request whose rows have all run; others are at their end."""
        deltas = [self._end(own, "length") for own, _ in sampling if not own.rows.max_new_tokens]
        sampling = [each for each in sampling if each[0].rows.max_new_tokens]
        if not sampling:
            return deltas
        rows = torch.tensor([row for _, row in sampling], device=logits.device)
        own_logits = logits if len(rows) == len(logits) else logits.index_select(0, rows)
        tokens = next_tokens(own_logits, [own.sampler for own, _ in sampling]).tolist()
        asked = [place for place, (own, _) in enumerate(sampling) if own.request.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            found = token_logprobs(
                own_logits[asked],
                [tokens[place] for place in asked],
                [sampling[place][0].request.logprobs or 0 for place in asked],
            )
            logprobs = dict(zip(asked, found, strict=True))
        for place, ((own, _), token) in enumerate(zip(sampling, tokens, strict=True)):
            deltas.append(self._take(own, token, logprobs.get(place)))
        return deltas

    def _take(self, own: _Answer, token: int, logprob: TokenLogprob | None) -> Delta:
        """Appends a token to an answer, or ends the answer with it."""
        own.sampler.note(token)
        ends = token in own.request.stop_ids
        text = own.stops.push(own.detokenizer.push([token])) if own.detokenizer is not None else ""
        reason: FinishReason | None = None
        if ends or own.stops.found is not None:
            reason = "stop"
        elif own.rows.max_new_tokens == 1:
            reason = "length"
        delta = Delta(number=own.rows.number, tokens=(token,), text=text, scored=own.take_scored())
        delta.logprobs = () if logprob is None else (logprob,)
        if reason is None:
            self.scheduler.append(own.rows, token)
            return delta
        last = self._end(own, reason)
        delta.text, delta.finish_reason = delta.text + last.text, reason
        return delta

    def _end(self, own: _Answer, reason: FinishReason, error: Exception | None = None) -> Delta:
        """Takes a request out; the delta has the text that was held back."""
        self.scheduler.finish(own.rows)
        del self._answers[own.rows.number]
        text = ""
        if own.detokenizer is not None and own.stops.found is None:
            text = own.stops.push(own.detokenizer.finish())
            text += own.stops.finish()
        return Delta(number=own.rows.number, text=text, scored=own.take_scored(), finish_reason=reason, error=error)
