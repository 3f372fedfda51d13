"""Token ids and labels of conversations, piece by piece as the released codes tokenise them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.control_tokens import TextEncoder, TextTokenizer
from parrot_sys.data.parts import IMAGE, ControlTokens, ImagePosition, Part, Parts, Turn
from parrot_sys.data.templates import Segment, Template

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BareTokenizer:
    """A `TextTokenizer` without transformers, which takes a process seconds to import."""

    backend_tokenizer: Any
    added_tokens_decoder: Mapping[int, Any]
    bos_token_id: Any
    eos_token_id: Any

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> BareTokenizer:
        """The same tokenizer."""
        backend, added = tokenizer.backend_tokenizer, dict(tokenizer.added_tokens_decoder)
        return cls(backend, added, tokenizer.bos_token_id, tokenizer.eos_token_id)


class Measures(NamedTuple):
    """Facts about the ids of a conversation: what an index keeps of them."""

    size: int
    """Ids, with one for each image."""
    images: list[int]
    """Places of the images among the ids."""
    labels: list[int]
    """First id, and id after the last, of each stretch that bears loss, one after the other."""


@dataclass(frozen=True)
class ConversationEncoder:
    """Template and tokenizer of a model, to be sent to other processes: what `ParrotProcessor` does with texts."""

    tokenizer: BareTokenizer
    template: Template
    image_position: ImagePosition
    control_tokens: ControlTokens

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_texts"}  # (quicker made than sent)

    def render(self, turns: Sequence[Turn]) -> list[Segment]:
        """Segments of a conversation."""
        return self.template.render(turns, image_position=self.image_position)

    def measure(self, conversations: Sequence[Sequence[Segment]]) -> list[Measures]:
        """Facts about each conversation, for an index."""
        return measure_conversations(self.tokenizer, self._texts, conversations)

    @cached_property
    def _texts(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.control_tokens)


def encode_conversations(
    tokenizer: TextTokenizer, encoder: TextEncoder, conversations: Sequence[Sequence[Segment]]
) -> list[tuple[IntArray, IntArray]]:
    """(input_ids, labels) of each conversation, int64 [n] both and not shifted.

    Each segment is tokenised on its own, and each stretch between images on its own. An image is IMAGE_TOKEN_ID.
    The label of a row is its id in an answer, after as many ids as the segment's prefix has, and IGNORE_ID elsewhere.
    """
    segments = [segment for conversation in conversations for segment in conversation]
    runs = [run for s in segments for parts in (s.parts, s.prefix) for run in _between_images(parts)]
    encoded = iter(encoder.encode(runs))
    result = []
    for conversation in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for segment in conversation:
            own, prefix = _with_images(segment.parts, encoded), _with_images(segment.prefix, encoded)
            if segment.begins and tokenizer.bos_token_id is not None:
                ids.append(tokenizer.bos_token_id)
                labels.append(IGNORE_ID)
            if segment.ends:
                own.append(tokenizer.eos_token_id)
            ids += own
            silent = min(len(prefix), len(own)) if segment.bears_loss else len(own)
            labels += [IGNORE_ID] * silent
            labels += [IGNORE_ID if i == IMAGE_TOKEN_ID else i for i in own[silent:]]
        result.append((np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)))
    return result


def measure_conversations(
    tokenizer: TextTokenizer, encoder: TextEncoder, conversations: Sequence[Sequence[Segment]]
) -> list[Measures]:
    """The facts that `encode_conversations` shows of each conversation, without the ids: in half of its time."""
    runs = []
    for segment in (segment for conversation in conversations for segment in conversation):
        runs += _between_images(segment.parts)
        if segment.bears_loss:
            runs += _between_images(segment.prefix)
    counts = iter(encoder.count(runs))
    opening = int(tokenizer.bos_token_id is not None)
    return [_measure(conversation, counts, opening) for conversation in conversations]


def _measure(conversation: Sequence[Segment], counts: Iterator[int], opening: int) -> Measures:
    """One conversation, whose counts come next; `opening` ids begin a segment that wants a first one."""
    at = 0
    images: list[int] = []
    labels: list[int] = []
    for segment in conversation:
        at += opening if segment.begins else 0
        start, before = at, len(images)
        at += next(counts)
        for _ in range(segment.parts.count(IMAGE)):
            images.append(at)
            at += 1 + next(counts)
        at += segment.ends
        if not segment.bears_loss:
            continue
        silent = next(counts)
        for _ in range(segment.prefix.count(IMAGE)):
            silent += 1 + next(counts)
        low = min(start + silent, at)
        for high in (*(place for place in images[before:] if place >= low), at):
            if labels and labels[-1] == low < high:
                labels[-1] = high
            elif low < high:
                labels += (low, high)
            low = high + 1
    return Measures(at, images, labels)


def _between_images(parts: Parts) -> list[Sequence[Part]]:
    """The stretches before, between and after images; one more than there are images."""
    if IMAGE not in parts:
        return [parts]
    runs: list[Any] = [[]]
    for part in parts:
        if part.kind == "image":
            runs.append([])
        else:
            runs[-1].append(part)
    return runs


def _with_images(parts: Parts, encoded: Iterator[list[int]]) -> list[int]:
    """Ids of parts whose stretches between images come next in `encoded`."""
    ids = [*next(encoded)]
    for part in parts:
        if part.kind == "image":
            ids += [IMAGE_TOKEN_ID, *next(encoded)]
    return ids


def tokenizer_fingerprint(tokenizer: TextTokenizer) -> str:
    """Hash of everything that decides which ids a text gets."""
    backend: Any = tokenizer.backend_tokenizer
    added = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return hashlib.sha256(f"{backend.to_str()}{added}".encode()).hexdigest()
