"""Decoding with a KV cache: one packed prefill, then one row a request and step. Routes are fixed by the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.data.packing import Sample
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.inference.lockstep import CachedRequests, Lockstep
from parrot_sys.inference.requests import Request, check_rows, num_rows, request_name
from parrot_sys.inference.sampling import next_tokens
from parrot_sys.megatron.attention.kv_cache import KVCache
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride


class Streamer(Protocol):
    """Receives tokens as they come (the interface of streamers in transformers)."""

    def put(self, value: Tensor) -> None:
        """The prompts, int64 [B, N], then each step's tokens, int64 [B] (padding for finished requests), on the CPU."""

    def end(self) -> None:
        """No more tokens."""


class WholeRequests:
    """Stand-in for a KV cache where none can be used: every step runs the whole requests again."""

    def __init__(
        self, samples: Sequence[Sample], routing_override: RoutingOverride | None = None, *, together: bool = True
    ) -> None:
        """
        Args:
            samples: prompts.
            routing_override: replaces the routes.
            together: run all in one pack. False where rows of a pack depend on its other samples: each runs alone.
        """
        self._together = together
        self._ids = [torch.as_tensor(sample.input_ids).cpu() for sample in samples]
        self._samples = list(samples)
        self._routing_override = routing_override

    def keep(self, samples: Tensor) -> None:
        """Keep only these requests, in this order: int64 [S']."""
        places = samples.tolist()
        self._ids = [self._ids[place] for place in places]
        self._samples = [self._samples[place] for place in places]

    def append(self, tokens: Tensor) -> None:
        """One more token for each request: int64 [S]."""
        self._ids = [torch.cat((ids, token[None])) for ids, token in zip(self._ids, tokens.cpu(), strict=True)]

    def run(self, model: Lockstep) -> tuple[Tensor, RoutingOutput | None]:
        """Logits of the rows after each request, float32 [S, vocabulary], and the routes of the images."""
        samples = [replace(sample, input_ids=ids) for sample, ids in zip(self._samples, self._ids, strict=True)]
        if self._together:
            return self._run(model, samples)
        results = [self._run(model, [sample]) for sample in samples]
        return torch.cat([logits for logits, _ in results]), None

    def _run(self, model: Lockstep, samples: Sequence[Sample]) -> tuple[Tensor, RoutingOutput | None]:
        batch = model.pack(samples)
        output = model.forward(
            batch, logits_rows=batch.cu_seqlens[1:].long() - 1, routing_override=self._routing_override
        )
        assert output.logits is not None, "logits come back to every rank"
        return output.logits.float(), output.routing


Requests = CachedRequests | WholeRequests


def prefill(
    model: Lockstep,
    samples: Sequence[Sample],
    new_tokens: Sequence[int] | None = None,
    routing_override: RoutingOverride | None = None,
    *,
    use_cache: bool = True,
) -> tuple[Tensor, Requests, RoutingOutput | None]:
    """Run the prompts.

    Args:
        model: in evaluation mode.
        samples: S prompts without labels, so that all their text guides routing.
        new_tokens: rows to leave room for after each prompt; None leaves none.
        routing_override: replaces the routes.
        use_cache: False runs the whole requests at every step, as models must that let a row read later ones.

    Returns:
        Logits of the rows after each prompt, float32 [S, vocabulary]; the filled cache, or its replacement; the
        routes of the images.

    Raises:
        DataError: a request is too long for the model, see `check_rows`.
        CheckpointError: a logit is not finite.
    """
    parrot = model.config
    room = [0] * len(samples) if new_tokens is None else list(new_tokens)
    check_rows(parrot, samples, room)
    names = [request_name(index, sample) for index, sample in enumerate(samples)]
    takes_cache = model.model.bridge.takes_cache
    if not (use_cache and takes_cache):
        requests = WholeRequests(samples, routing_override, together=takes_cache)
        logits, routing = requests.run(model)
        check_finite(logits, names)
        return logits, requests, routing
    batch = model.pack(samples)
    capacity = max(num_rows(parrot, sample) + new for sample, new in zip(samples, room, strict=True))
    cached = CachedRequests(KVCache(len(samples), capacity, device=model.device))
    last_rows = batch.cu_seqlens[1:].long() - 1
    output = model.forward(batch, logits_rows=last_rows, routing_override=routing_override, requests=cached)
    assert output.logits is not None, "logits come back to every rank"
    logits = output.logits.float()
    check_finite(logits, names)
    return logits, cached, output.routing


def check_finite(logits: Tensor, names: Sequence[str]) -> None:
    """Refuses logits [S, vocabulary] that are no numbers: a maximum over NaN would choose a token all the same.

    Args:
        logits: after the rows so far.
        names: of the S requests.

    Raises:
        CheckpointError: a logit is NaN or infinite; names the first such request.
    """
    finite = logits.isfinite()
    if bool(finite.all()):
        return
    wrong = (~finite).sum(1).tolist()
    place = next(place for place, count in enumerate(wrong) if count)
    others = sum(map(bool, wrong)) - 1
    more = f" and {others} more" if others else ""
    raise CheckpointError(
        f"{names[place]}{more}: {wrong[place]} of {logits.shape[1]} logits are NaN or infinite, so that no token is "
        "the most likely one: the checkpoint's weights are damaged, or its numbers are too large for the dtype (try "
        "dtype float32)"
    )


def decode(model: Lockstep, tokens: Tensor, requests: Requests, names: Sequence[str]) -> Tensor:
    """Append one token to each request: int64 [S] -> logits after it, float32 [S, vocabulary].

    Args:
        model: as for `prefill`.
        tokens: int64 [S].
        requests: from `prefill`.
        names: of the S requests, for error messages.

    Raises:
        CheckpointError: a logit is not finite.
    """
    if isinstance(requests, WholeRequests):
        requests.append(tokens)
        logits = requests.run(model)[0]
    else:
        output = model.forward(_step_batch(tokens, requests.cache.lengths), requests=requests)
        assert output.logits is not None, "logits come back to every rank"
        logits = output.logits.float()
    check_finite(logits, names)
    return logits


def _step_batch(tokens: Tensor, positions: Tensor) -> PackedBatch:
    count, device = tokens.numel(), tokens.device
    no_rows = torch.empty(0, dtype=torch.int64, device=device)
    no_spans = torch.empty(0, dtype=torch.int32, device=device)
    return PackedBatch(
        input_ids=tokens,
        labels=torch.full_like(tokens, IGNORE_ID),
        label_rows=no_rows,
        position_ids=positions,
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device),
        max_seqlen=1,
        visual_rows=no_rows,
        visual_source=no_rows,
        guidance_rows=no_rows,
        guidance_start=no_spans,
        guidance_end=no_spans,
        image_sample=no_rows,
    )


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that is being answered."""

    place: int
    """In the batch, and in the answers."""
    request: Request
    generator: torch.Generator | None
    """Its own random numbers; None when nothing is drawn."""

    @property
    def name(self) -> str:
        """For error messages."""
        return request_name(self.place, self.request.sample)

    def goes_on(self, token: int, count: int) -> bool:
        """Whether the answer goes on after its `count`-th token."""
        return token not in self.request.eos_token_ids and count < self.request.max_new_tokens


def generate_tokens(
    model: Lockstep,
    requests: Sequence[Request],
    *,
    pad_token_id: int,
    streamer: Streamer | None = None,
    routing_override: RoutingOverride | None = None,
    use_cache: bool = True,
) -> tuple[Tensor, RoutingOutput | None]:
    """Answers of all requests, int64 [S, M] on the CPU, and the routes of the images.

    Each is what the request would get alone. It ends with the first of its `eos_token_ids`, which is kept, or after its
    `max_new_tokens`; `pad_token_id` fills the row after it up to the longest answer, M. Finished requests leave the
    cache, so that they cost nothing more.

    Raises:
        DataError: a request is too long for the model.
        CheckpointError: a logit is not finite.
    """
    samples = [request.sample for request in requests]
    room = [request.max_new_tokens for request in requests]
    logits, cache, routing = prefill(model, samples, room, routing_override, use_cache=use_cache)
    running = [_Running(place, each, _generator(each, logits.device)) for place, each in enumerate(requests)]
    penalizes = any(request.sampling.repetition_penalty != 1 for request in requests)
    seen = _seen_tokens(samples, logits) if penalizes else None
    steps: list[Tensor] = []
    while True:
        tokens = _choose(logits, running, seen)
        host_tokens = tokens.tolist()
        step = torch.full((len(requests),), pad_token_id)
        step[[each.place for each in running]] = torch.tensor(host_tokens)
        steps.append(step)
        if streamer is not None:
            streamer.put(step)
        going = [p for p, each in enumerate(running) if each.goes_on(host_tokens[p], len(steps))]
        if not going:
            return torch.stack(steps, dim=1), routing
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if len(going) < len(running):
            kept = torch.tensor(going, device=tokens.device)
            cache.keep(kept)
            tokens = tokens.index_select(0, kept)
            seen = None if seen is None else seen.index_select(0, kept)
            running = [running[place] for place in going]
        logits = decode(model, tokens, cache, [each.name for each in running])


def _generator(request: Request, device: torch.device) -> torch.Generator | None:
    if not request.sampling.do_sample:
        return None
    seed = int(torch.randint(2**62, ())) if request.seed is None else request.seed
    return torch.Generator(device).manual_seed(seed)


def _choose(logits: Tensor, running: Sequence[_Running], seen: Tensor | None) -> Tensor:
    """Next token of each request, int64 [S]: all in one go that take the most likely one alike, drawn ones one by one,
    so that no draw depends on how many others there are."""
    groups: dict[object, list[int]] = {}
    for place, each in enumerate(running):
        groups.setdefault(place if each.generator is not None else each.request.sampling, []).append(place)
    tokens = torch.empty(len(running), dtype=torch.int64, device=logits.device)
    for places in groups.values():
        first, rows = running[places[0]], torch.tensor(places, device=logits.device)
        own = None if seen is None else seen.index_select(0, rows)
        tokens[rows] = next_tokens(logits.index_select(0, rows), first.request.sampling, own, first.generator)
    return tokens


def _seen_tokens(samples: Sequence[Sample], logits: Tensor) -> Tensor:
    """bool like `logits`: tokens in each prompt, image markers left out."""
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, sample in zip(seen, samples, strict=True):
        ids = torch.as_tensor(sample.input_ids)
        row[ids[ids >= 0]] = True
    return seen.to(logits.device)


def continuation_log_probs(
    model: Lockstep,
    samples: Sequence[Sample],
    continuations: Sequence[Sequence[Sequence[int]]],
    routing_override: RoutingOverride | None = None,
) -> tuple[list[Tensor], RoutingOutput | None]:
    """Summed log-probabilities of given continuations; each prompt runs once for all of its own.

    Args:
        model: in evaluation mode.
        samples: S prompts.
        continuations: for each prompt its K_s continuations, at least one token each.
        routing_override: replaces the routes.

    Returns:
        float32 [K_s] on the CPU for each prompt, and the routes of the images.

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
    counts = [len(options) for options in continuations]
    requests = [list(option) for options in continuations for option in options]
    longest = [max(map(len, options)) for options in continuations]
    names = [request_name(i, sample) for i, sample in enumerate(samples) for _ in range(counts[i])]
    logits, cache, routes = prefill(model, samples, longest, routing_override)
    sums = torch.zeros(len(requests))
    prompts = torch.arange(len(samples), device=logits.device)
    rows = prompts.repeat_interleave(torch.tensor(counts, device=logits.device))
    logits = logits.index_select(0, rows)
    running = list(range(len(requests)))
    for step in range(max(longest)):
        tokens = torch.tensor([requests[r][step] for r in running], device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        sums[running] += chosen.cpu()
        going = [place for place, r in enumerate(running) if len(requests[r]) > step + 1]
        if not going:
            break
        kept = torch.tensor(going, device=logits.device)
        cache.keep(rows.index_select(0, kept))
        rows = torch.arange(len(going), device=logits.device)  # from now on one cache entry for each request
        running = [running[place] for place in going]
        logits = decode(model, tokens.index_select(0, kept), cache, [names[r] for r in running])
    return list(sums.split(counts)), routes
