"""Batches of requests on the engine: answers, and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from parrot_sys.data.packing import Sample
from parrot_sys.engine.config import EngineConfig, SchedulerConfig
from parrot_sys.engine.core import Engine
from parrot_sys.engine.detokenizer import TextDecoder
from parrot_sys.engine.lockstep import Lockstep
from parrot_sys.engine.requests import (
    Delta,
    EngineRequest,
    RequestImage,
    finite_rows,
    merge_routes,
    not_finite,
    num_images,
)
from parrot_sys.engine.sampler import TokenLogprob
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.inference.requests import check_rows, num_rows, request_name
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride

_BLOCK_SIZE = 16
_ROWS_PER_STEP = 4096
_LOGITS_PER_STEP = 512


class Streamer(Protocol):
    """Receives tokens as they come (the interface of streamers in transformers)."""

    def put(self, value: Tensor) -> None:
        """The prompts, int64 [B, N], then each step's tokens, int64 [B] (padding for finished requests), on the CPU."""

    def end(self) -> None:
        """No more tokens."""


class _Batch:
    """Requests that are submitted together to an engine of their own, which has room for all of them."""

    def __init__(
        self,
        model: Lockstep,
        requests: Sequence[EngineRequest],
        names: Sequence[str],
        override: RoutingOverride | None,
        *,
        use_cache: bool = True,
        tokenizer: TextDecoder | None = None,
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            requests: what is asked.
            names: of the requests, for error messages.
            override: replaces the routes; `probs` has a row for each image of all requests.
            use_cache: False computes whole requests with every step.
            tokenizer: makes texts of the answers; needed for stop strings.
        """
        config = model.config
        rows = [num_rows(config, own.sample) + len(own.given) + own.max_new_tokens for own in requests]
        blocks = sum(-(-count // _BLOCK_SIZE) for count in rows)
        count = len(requests)
        sizes = SchedulerConfig(
            max_running=count,
            max_queue=count,
            max_rows_per_step=max(_ROWS_PER_STEP, count),
            max_logits_per_step=max(_LOGITS_PER_STEP, count),
        )
        # (One block more for each: requests are admitted only while all running ones may grow.)
        engine_config = EngineConfig(num_blocks=blocks + count + 1, block_size=_BLOCK_SIZE, scheduler=sizes)
        self._engine = Engine(model, engine_config, tokenizer=tokenizer, use_cache=use_cache)
        self._places: dict[int, int] = {}
        self._names = names
        self.images: list[tuple[RequestImage, ...]] = []
        """Of each request; with routes once its prompt has run."""
        seen = 0
        for place, request in enumerate(requests):
            count = num_images(request.sample)
            number = self._engine.submit(replace(request, routing_override=_part(override, seen, count)))
            seen += count
            self._places[number] = place
            self.images.append(self._engine.images(number))

    def steps(self) -> Iterator[list[tuple[int, Delta]]]:
        """Deltas of each step, with the places of their requests.

        Raises:
            CheckpointError: a logit is not finite; names the first such request.
        """
        while self._engine.has_requests:
            deltas = [(self._places[delta.number], delta) for delta in self._engine.step()]
            failed = {place: delta.error for place, delta in deltas if delta.error is not None}
            if failed:
                first = min(failed)
                prompts = {self._names[place] for place in failed}
                raise CheckpointError(_named(self._names[first], len(prompts) - 1, failed[first]))
            yield deltas

    def routes(self) -> RoutingOutput | None:
        """Routes of the images of all requests."""
        return merge_routes([image for images in self.images for image in images])


def _part(override: RoutingOverride | None, start: int, count: int) -> RoutingOverride | None:
    if override is None or override.probs is None:
        return override
    return RoutingOverride(probs=override.probs[start : start + count])


def next_logits(
    model: Lockstep, samples: Sequence[Sample], routing_override: RoutingOverride | None = None
) -> tuple[Tensor, RoutingOutput | None]:
    """Logits of the rows after each of S prompts, float32 [S, vocabulary], and the routes of the images.

    Raises:
        DataError: a prompt is too long for the model.
        CheckpointError: a logit is not finite.
    """
    check_rows(model.config, samples, [0] * len(samples))
    groups = [samples] if model.takes_cache else [[sample] for sample in samples]  # else rows depend on other samples
    outputs = []
    for group in groups:
        batch = model.pack(group)
        outputs.append(
            model.forward(batch, logits_rows=batch.cu_seqlens[1:].long() - 1, routing_override=routing_override)
        )
    logits = torch.cat([output.logits.float() for output in outputs if output.logits is not None])
    check_finite(logits, [request_name(place, sample) for place, sample in enumerate(samples)])
    return logits, outputs[0].routing if len(outputs) == 1 else None


def check_finite(logits: Tensor, names: Sequence[str]) -> None:
    """Refuses logits [S, vocabulary] that are no numbers: a maximum over NaN would choose a token all the same.

    Args:
        logits: after the rows so far.
        names: of the S requests.

    Raises:
        CheckpointError: a logit is NaN or infinite; names the first such request.
    """
    finite = finite_rows(logits)
    if not all(finite):
        place, others = finite.index(False), finite.count(False) - 1
        raise CheckpointError(_named(names[place], others, not_finite(logits[place : place + 1])))


def _named(name: str, others: int, error: Exception) -> str:
    return f"{name}{f' and {others} more' if others else ''}: {error}"


def generate_tokens(
    model: Lockstep,
    requests: Sequence[EngineRequest],
    *,
    pad_token_id: int,
    streamer: Streamer | None = None,
    routing_override: RoutingOverride | None = None,
    use_cache: bool = True,
    tokenizer: TextDecoder | None = None,
) -> tuple[Tensor, RoutingOutput | None]:
    """Answers of all requests, int64 [S, M] on the CPU, and the routes of the images.

    Each is what the request would get alone. It ends with the first of its `stop_ids`, which is kept, with the token
    that completes one of its `stop_strings` (these need the tokenizer), or after its `max_new_tokens`; `pad_token_id`
    fills the row after it up to the longest answer, M.

    Raises:
        DataError: a request is too long for the model.
        CheckpointError: a logit is not finite.
        ConfigError: a request has stop strings, and there is no tokenizer.
    """
    batch = _answering(model, requests, routing_override, use_cache=use_cache, tokenizer=tokenizer)
    answers: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    shown = 0
    for deltas in batch.steps():
        for place, delta in deltas:
            answers[place] += delta.tokens
            ended[place] = delta.finish_reason is not None
        ready = min(
            (len(own) for own, end in zip(answers, ended, strict=True) if not end), default=max(map(len, answers))
        )
        for column in range(shown, ready if streamer is not None else shown):
            assert streamer is not None, "columns are for it"
            streamer.put(torch.tensor([own[column] if column < len(own) else pad_token_id for own in answers]))
        shown = ready
    longest = max(map(len, answers))
    if streamer is not None:
        streamer.end()
    rows = [own + [pad_token_id] * (longest - len(own)) for own in answers]
    return torch.tensor(rows), batch.routes()


def generate_texts(model: Lockstep, requests: Sequence[EngineRequest], tokenizer: TextDecoder) -> list[str]:
    """Texts of the answers to all requests, up to a stop string and without special tokens; see `generate_tokens`."""
    texts: list[list[str]] = [[] for _ in requests]
    for deltas in _answering(model, requests, tokenizer=tokenizer).steps():
        for place, delta in deltas:
            texts[place].append(delta.text)
    return ["".join(pieces) for pieces in texts]


def _answering(
    model: Lockstep,
    requests: Sequence[EngineRequest],
    routing_override: RoutingOverride | None = None,
    *,
    use_cache: bool = True,
    tokenizer: TextDecoder | None = None,
) -> _Batch:
    """The engine with requests that are not too long."""
    samples = [request.sample for request in requests]
    check_rows(model.config, samples, [request.max_new_tokens for request in requests])
    names = [request_name(index, sample) for index, sample in enumerate(samples)]
    return _Batch(model, requests, names, routing_override, use_cache=use_cache, tokenizer=tokenizer)


def score_continuations(
    model: Lockstep,
    samples: Sequence[Sample],
    continuations: Sequence[Sequence[Sequence[int]]],
    routing_override: RoutingOverride | None = None,
) -> tuple[list[list[list[TokenLogprob]]], RoutingOutput | None]:
    """Log-probabilities of the tokens of given continuations; all of a prompt's run in one pass and share its rows.

    Args:
        model: in evaluation mode.
        samples: S prompts.
        continuations: for each prompt its K_s continuations, at least one token each.
        routing_override: replaces the routes.

    Returns:
        For each prompt, each continuation and each token its log-probability; and the routes of the images.

    Raises:
        DataError: no continuations for a prompt, an empty one, or one that is too long for the model.
        CheckpointError: a logit is not finite.
    """
    if len(continuations) != len(samples):
        raise DataError(f"continuations must be given for each of the {len(samples)} prompts, got {len(continuations)}")
    for index, options in enumerate(continuations):
        if not options or not all(options):
            raise DataError(
                f"prompt {index} needs at least one continuation and each at least one token, got {list(options)}"
            )
    # (The last token of a continuation takes no row: nothing is asked of what follows it.)
    check_rows(model.config, samples, [max(map(len, options)) - 1 for options in continuations])
    owners = [index for index, options in enumerate(continuations) for _ in options]
    requests = [
        EngineRequest(sample=samples[index], max_new_tokens=0, given=tuple(option))
        for index, options in enumerate(continuations)
        for option in options
    ]
    if routing_override is not None and routing_override.probs is not None:
        routing_override = RoutingOverride(probs=_repeated(routing_override.probs, samples, continuations))
    names = [request_name(index, samples[index]) for index in owners]
    batch = _Batch(model, requests, names, routing_override)
    found: list[list[TokenLogprob]] = [[] for _ in requests]
    for deltas in batch.steps():
        for place, delta in deltas:
            found[place] += delta.scored
    by_prompt: list[list[list[TokenLogprob]]] = [[] for _ in samples]
    for index, own in zip(owners, found, strict=True):
        by_prompt[index].append(own)
    firsts = [owners.index(index) for index in range(len(samples))]
    return by_prompt, merge_routes([image for first in firsts for image in batch.images[first]])


def _repeated(probs: Tensor, samples: Sequence[Sample], continuations: Sequence[Sequence[object]]) -> Tensor:
    """Routes [n, E] of the images of all prompts, those of a prompt once for each of its continuations."""
    counts = [num_images(sample) for sample in samples]
    parts = [
        part for part, options in zip(probs.split(counts), continuations, strict=True) for part in [part] * len(options)
    ]
    return torch.cat(parts)
