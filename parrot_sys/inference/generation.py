"""Decoding with a KV cache: one packed prefill, then one row a request and step. Routes are fixed by the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.data.packing import Sample, expanded_lengths, pack_samples
from parrot_sys.errors import DataError
from parrot_sys.inference.lockstep import Lockstep
from parrot_sys.inference.sampling import SamplingConfig, next_tokens
from parrot_sys.megatron.kv_cache import KVCache
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride


class Streamer(Protocol):
    """Receives tokens as they come (the interface of streamers in transformers)."""

    def put(self, value: Tensor) -> None:
        """The prompts, int64 [B, N], then each step's tokens, int64 [B] (padding for finished requests), on the CPU."""

    def end(self) -> None:
        """No more tokens."""


class WholeRequests:
    """What stands in for a KV cache where none can be used: every step runs the whole requests again."""

    def __init__(self, samples: Sequence[Sample], override: RoutingOverride | None = None) -> None:
        """
        Args:
            samples: prompts.
            override: replaces the routes.
        """
        self._ids = [torch.as_tensor(sample.input_ids).cpu() for sample in samples]
        self._samples = list(samples)
        self._override = override

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
        parrot = model.model.parrot
        batch = pack_samples(samples, num_visual_rows=parrot.rows_per_image, guidance=parrot.moe.guidance)
        batch = batch.to(model.device)
        output = model.forward(batch, logits_rows=batch.cu_seqlens[1:].long() - 1, override=self._override)
        assert output.logits is not None, "logits come back to every rank"
        return output.logits.float(), output.routing


Requests = KVCache | WholeRequests


def prefill(
    model: Lockstep,
    samples: Sequence[Sample],
    new_tokens: int,
    override: RoutingOverride | None = None,
    *,
    use_cache: bool = True,
) -> tuple[Tensor, Requests, RoutingOutput | None]:
    """Run the prompts.

    Args:
        model: in evaluation mode.
        samples: prompts without labels, so that all their text guides routing.
        new_tokens: rows to leave room for after each prompt.
        override: replaces the routes.
        use_cache: False runs the whole requests at every step, as models must that let a row read later ones.

    Returns:
        Logits of the rows after each prompt, float32 [S, vocabulary]; the filled cache, or what stands in for it; the
        routes of the images.

    Raises:
        DataError: a prompt with its images is longer than the model's positions.
    """
    parrot = model.model.parrot
    limit = parrot.max_positions
    rows = parrot.rows_per_image
    for index, sample in enumerate(samples):
        length = expanded_lengths(np.asarray(sample.input_ids), rows, limit)[1]
        if length + new_tokens > limit:
            raise DataError(
                f"prompt {index} has {length} rows with its images; with {new_tokens} new tokens it exceeds the "
                f"{limit} positions of the model (llm.max_position_embeddings, wings.router_positions): shorten it or "
                "lower max_new_tokens"
            )
    if not (use_cache and model.model.takes_cache):
        requests = WholeRequests(samples, override)
        logits, routing = requests.run(model)
        return logits, requests, routing
    device = model.device
    batch = pack_samples(samples, num_visual_rows=rows, guidance=parrot.moe.guidance).to(device)
    cache = KVCache(len(samples), batch.max_seqlen + new_tokens, device=device)
    last_rows = batch.cu_seqlens[1:].long() - 1
    output = model.forward(batch, logits_rows=last_rows, override=override, cache=cache)
    assert output.logits is not None, "logits come back to every rank"
    return output.logits.float(), cache, output.routing


def decode(model: Lockstep, tokens: Tensor, cache: Requests) -> Tensor:
    """Append one token to each request of the cache: int64 [S] -> logits after it, float32 [S, vocabulary]."""
    if isinstance(cache, WholeRequests):
        cache.append(tokens)
        return cache.run(model)[0]
    batch = _step_batch(tokens, cache.lengths)
    logits = model.forward(batch, cache=cache).logits
    assert logits is not None, "logits come back to every rank"
    return logits.float()


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


def generate_tokens(
    model: Lockstep,
    samples: Sequence[Sample],
    config: SamplingConfig,
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    pad_token_id: int,
    seed: int | None = None,
    streamer: Streamer | None = None,
    override: RoutingOverride | None = None,
    use_cache: bool = True,
) -> tuple[Tensor, RoutingOutput | None]:
    """Answers of all prompts, int64 [S, M] on the CPU with M <= max_new_tokens, and the routes of the images.

    A request ends with the first of `eos_token_ids`, which is kept; `pad_token_id` fills the row behind it. Finished
    requests leave the cache, so that they cost nothing more.
    """
    logits, cache, routing = prefill(model, samples, max_new_tokens, override, use_cache=use_cache)
    generator = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
    seen = _seen_tokens(samples, logits) if config.repetition_penalty != 1 else logits.new_zeros(0, dtype=torch.bool)
    running = list(range(len(samples)))
    steps: list[Tensor] = []
    while True:
        tokens = next_tokens(logits, config, seen, generator)
        host_tokens = tokens.tolist()
        step = torch.full((len(samples),), pad_token_id)
        step[running] = torch.tensor(host_tokens)
        steps.append(step)
        if streamer is not None:
            streamer.put(step)
        going = [place for place, token in enumerate(host_tokens) if token not in eos_token_ids]
        if not going or len(steps) == max_new_tokens:
            break
        if seen.numel():
            seen.scatter_(1, tokens[:, None], True)
        if len(going) < len(running):
            kept = torch.tensor(going, device=tokens.device)
            cache.keep(kept)
            tokens = tokens.index_select(0, kept)
            seen = seen.index_select(0, kept) if seen.numel() else seen
            running = [running[place] for place in going]
        logits = decode(model, tokens, cache)
    return torch.stack(steps, dim=1), routing


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
    override: RoutingOverride | None = None,
) -> tuple[list[Tensor], RoutingOutput | None]:
    """Summed log-probabilities of given continuations; each prompt runs once for all of its own.

    Args:
        model: in evaluation mode.
        samples: S prompts.
        continuations: for each prompt its K_s continuations, at least one token each.
        override: replaces the routes.

    Returns:
        float32 [K_s] on the CPU for each prompt, and the routes of the images.

    Raises:
        DataError: no continuations for a prompt, or an empty one.
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
    logits, cache, routes = prefill(model, samples, max(map(len, requests)), override)
    sums = torch.zeros(len(requests))
    prompts = torch.arange(len(samples), device=logits.device)
    rows = prompts.repeat_interleave(torch.tensor(counts, device=logits.device))
    logits = logits.index_select(0, rows)
    running = list(range(len(requests)))
    for step in range(max(map(len, requests))):
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
        logits = decode(model, tokens.index_select(0, kept), cache)
    return list(sums.split(counts)), routes
