"""Token ids and labels of conversations, piece by piece as the released codes tokenise them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.control_tokens import TextEncoder
from parrot_sys.data.parts import Part, Parts
from parrot_sys.data.templates import Segment

IntArray = npt.NDArray[np.int64]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, conversations: Sequence[Sequence[Segment]]
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


def _between_images(parts: Parts) -> list[list[Part]]:
    """The stretches before, between and after images; one more than there are images."""
    runs: list[list[Part]] = [[]]
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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets."""
    backend: Any = tokenizer.backend_tokenizer
    added = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return hashlib.sha256(f"{backend.to_str()}{added}".encode()).hexdigest()
