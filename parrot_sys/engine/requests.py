"""A request to the engine, the rows that it becomes, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from parrot_sys.data.packing import Guidance, Sample, pack_samples
from parrot_sys.engine.blocks import PictureSpan, digest, ids_digest
from parrot_sys.engine.encoder_cache import pixels_digest
from parrot_sys.engine.sampler import SamplingParams, TokenLogprob
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.towers import PictureRows

FinishReason = Literal["stop", "length", "cancelled", "expired", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """A prompt and everything that decides its answer."""

    sample: Sample
    """Prompt without labels, and its pictures."""
    max_new_tokens: int
    """Longest answer; 0 answers nothing and only scores."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the answer, the id itself included."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    logprobs: int | None = None
    """Log-probabilities of the answer's tokens, and of so many most likely ones; None: none."""
    given: tuple[int, ...] = ()
    """Tokens after the prompt, of which log-probabilities are wanted; an answer goes on after them. They guide no
    routes."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens but the first, and of so many most likely ones; None: none."""
    routing_override: RoutingOverride | None = None
    """Replaces the routes of its pictures; `probs` with one row for each of its images."""
    routes: bool = False
    """Tell the routes of its pictures and what their router attended to, also where the cache has all of its rows."""
    deadline: float | None = None
    """Time after which nobody waits for the answer, by the engine's clock."""
    salt: bytes = b""
    """Requests with different ones share no cached rows."""
    digests: tuple[bytes, ...] = ()
    """`picture_digests` of the sample, where they are known already; else they are worked out when it is submitted."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must be >= 0, got {self.max_new_tokens}")
        if not (self.max_new_tokens or self.given or self.prompt_logprobs is not None):
            raise ConfigError("max_new_tokens must be >= 1 where nothing is scored, got 0")


class ImageReaders(Protocol):
    """Rows of a request that hold or read each of its pictures: depends on the system."""

    def __call__(self, places: Sequence[range]) -> list[range]:
        """Rows for each picture, from the rows that take its place in the text; both ascending."""


@dataclass(kw_only=True, slots=True)
class RequestImage:
    """A picture of a request: k images, several where it is cut into tiles."""

    place: range
    """Rows that take its place in the text."""
    readers: range
    """Rows whose keys and values depend on it directly: those that hold it, or that read it."""
    source: Tensor
    """int64 [R]: row of its k * V features that each of its rows takes, or NEWLINE."""
    num_images: int
    """k."""
    pixels: Tensor | None
    """[k, 3, h, w], or ..."""
    features: Tensor | None
    """... [k, V, C], outputs of the tower."""
    image: bytes
    """Digest of pixels or features, and of the rows taken of them."""
    guidance: bytes
    """Digest of the text that guides its route."""
    rows: Tensor | None = None
    """[R', W]: what the decoder gets of it. Kept when the request is preempted."""
    route: tuple[Tensor, ...] = ()
    """Decisions of the router, [k, ...] each."""
    attention: Tensor | None = None
    """float32 [k, G]: weight of each row of the guiding text in what the router saw; for requests that ask for it."""

    def span(self) -> PictureSpan:
        """Its part in the identity of blocks."""
        return PictureSpan(start=self.readers.start, stop=self.readers.stop, image=self.image, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedPrompt:
    """Rows of a prompt with its images in place."""

    ids: list[int]
    images: tuple[RequestImage, ...]
    guidance_ids: Tensor
    """int64 [G]: the text that guides the routes of all images."""


def expand(
    request: EngineRequest, rows_per_image: int, guidance: Guidance, readers: ImageReaders, *, guided: bool
) -> ExpandedPrompt:
    """The rows of a request's prompt.

    Args:
        request: with `rows_per_image` rows for each image in its place.
        rows_per_image: V, or 1 where rows read their image from elsewhere.
        guidance: which text guides routes.
        readers: of the system.
        guided: whether routes depend on the text at all.

    Raises:
        DataError: markers and images do not fit together.
    """
    sample = request.sample
    batch = pack_samples([sample], num_visual_rows=rows_per_image, guidance=guidance)
    guidance_ids = batch.input_ids.index_select(0, batch.guidance_rows)
    pictures = sample.pictures
    if pictures is None:
        pictures = (PictureRows.whole(rows_per_image),) * batch.num_images
    visual = batch.visual_rows.tolist()
    places, used = [], 0
    for picture in pictures:
        places.append(range(visual[used], visual[used] + len(picture.source)))
        used += len(picture.source)
    words = ids_digest(guidance_ids.tolist()) if guided and places else b""
    override, images, first = request.routing_override, [], 0
    digests = request.digests or picture_digests(sample)
    for picture, place, read, known in zip(pictures, places, readers(places), digests, strict=True):
        own = slice(first, first + picture.tiles)
        first += picture.tiles
        pixels = None if sample.pixel_values is None else sample.pixel_values[own]
        features = None if sample.image_features is None else sample.image_features[own]
        source = torch.from_numpy(picture.source)
        images.append(
            RequestImage(
                place=place,
                readers=read,
                source=source,
                num_images=picture.tiles,
                pixels=pixels,
                features=features,
                image=digest(known, ids_digest(picture.source.tolist())),
                guidance=words if override is None else _overridden(override, own),
            )
        )
    return ExpandedPrompt(ids=batch.input_ids.tolist(), images=tuple(images), guidance_ids=guidance_ids)


def picture_digests(sample: Sample) -> tuple[bytes, ...]:
    """Identity of each picture of a sample by its pixels, or by its features: some milliseconds for each."""
    values = sample.pixel_values if sample.pixel_values is not None else sample.image_features
    if values is None:
        return ()
    counts = [1] * len(values) if sample.pictures is None else [picture.tiles for picture in sample.pictures]
    return tuple(pixels_digest(own) for own in values.split(counts))


def num_images(sample: Sample) -> int:
    """Images of a sample, tiles counted one by one."""
    values = sample.pixel_values if sample.pixel_values is not None else sample.image_features
    return 0 if values is None else len(values)


def _overridden(override: RoutingOverride, own: slice) -> bytes:
    if override.probs is None:
        return digest(b"override", str(override.mode).encode())
    return digest(b"override", pixels_digest(override.probs[own]))


@dataclass(kw_only=True, slots=True)
class Delta:
    """Tokens and text that a step added to an answer."""

    number: int
    """Of the request."""
    tokens: tuple[int, ...] = ()
    text: str = ""
    """Text that is certain now; without a tokenizer always empty."""
    logprobs: tuple[TokenLogprob, ...] = ()
    scored: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens and those given after it, as far as they were asked for; with the first token, or the last
    delta."""
    finish_reason: FinishReason | None = None
    """Set with the last of a request's deltas."""
    error: Exception | None = None
    """With the reason `error`."""


def merge_routes(images: Sequence[RequestImage]) -> RoutingOutput | None:
    """Routes of images in their order, on the CPU; None where none was routed."""
    routes = [image.route for image in images if image.route]
    if not routes:
        return None
    logits, probs, *indices = (torch.cat(parts) for parts in zip(*routes, strict=True))
    return RoutingOutput(logits=logits, probs=probs, topk_indices=indices[0] if indices else None)


def finite_rows(logits: Tensor) -> list[bool]:
    """Which rows of logits [K, V] are numbers throughout."""
    # A sum is no finite number if one of its terms is none, and takes a tenth of the time.
    if math.isfinite(float(logits.sum())):
        return [True] * len(logits)
    finite: list[bool] = logits.isfinite().all(1).tolist()
    return finite


def not_finite(logits: Tensor) -> CheckpointError:
    """Error of logits [K, V] of which some are no numbers: a maximum over NaN would choose a token all the same."""
    wrong = max((~logits.isfinite()).sum(1).tolist())
    return CheckpointError(
        f"{wrong} of {logits.shape[1]} logits are NaN or infinite, so that no token is the most likely one: the "
        "checkpoint's weights are damaged, or its numbers are too large for the dtype (try dtype float32)"
    )
