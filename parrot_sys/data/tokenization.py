"""Token ids and labels of conversations, piece by piece as the released codes tokenise them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.control_tokens import TextEncoder, encode_texts
from parrot_sys.data.parts import Part, Parts
from parrot_sys.data.templates import CHATML, Segment, Template
from parrot_sys.errors import CheckpointError

IntArray = npt.NDArray[np.int64]


def load_tokenizer(path: str | Path, template: Template = CHATML) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in a directory, with the special tokens of a template checked. Uses no network.

    Raises:
        CheckpointError: no tokenizer there, or it lacks one of the special tokens.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"tokenizer: {path} must be a directory with tokenizer.json or vocab.json and merges.txt")
    try:
        # An empty config keeps transformers from warning that it does not know model_type parrot_qwen2.
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, config=PreTrainedConfig())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer: {path} holds none that can be read: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"tokenizer: {path} must hold one of the tokenizers library, got {type(tokenizer).__name__}"
        )
    for token in template.special_tokens:
        if (got := encode_texts(tokenizer.backend_tokenizer, [token])[0]) != [tokenizer.convert_tokens_to_ids(token)]:
            raise CheckpointError(f"tokenizer: {path} must have the special token {token}, got {len(got)} ids for it")
    if template.end_token is not None:
        tokenizer.eos_token = template.end_token
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"tokenizer: {path} must have an end-of-sequence token for the {template.name} template")
    tokenizer.pad_token = template.pad_token or tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(path: str | Path) -> bool:
    """Whether a directory holds a tokenizer of any kind."""
    return any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)


class MissingTokenizer:
    """Stands for the tokenizer of a checkpoint that has none: ids and images still work, text is an error."""

    def __init__(self, directory: str | Path) -> None:
        self.__dict__["_directory"] = directory

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CheckpointError(
            f"{self.__dict__['_directory']} holds no tokenizer, which text needs: give --llm a directory with LLaMA's "
            "tokenizer (tokenizer.json or tokenizer.model) and convert again"
        )


def with_flamingo_tokens(path: str | Path, tokens: Sequence[str]) -> PreTrainedTokenizerBase | None:
    """LLaMA's tokenizer with OpenFlamingo's tokens (and `<PAD>`, if it has no padding) behind its own.

    Args:
        path: directory; the result is None when it holds no tokenizer.
        tokens: in the order of their ids.

    Raises:
        CheckpointError: the files cannot be read.
    """
    if not has_tokenizer(path):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, config=PreTrainedConfig()
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"tokenizer: {path} holds none that can be read: {error}") from error
    # (As the released code adds them: first these, then the padding.)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, conversations: Sequence[Sequence[Segment]]
) -> list[tuple[IntArray, IntArray]]:
    """(input_ids, labels) of each conversation, int64 [n] both and not shifted.

    Each segment is tokenised on its own, and each stretch between images on its own. An image is IMAGE_TOKEN_ID.
    The label of a row is its id in an answer, behind as many ids as the segment's prefix has, and IGNORE_ID elsewhere.
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
    """The stretches before, between and behind images; one more than there are images."""
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
    for _ in range(sum(part.kind == "image" for part in parts)):
        ids += [IMAGE_TOKEN_ID, *next(encoded)]
    return ids


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides which ids a text gets."""
    backend: Any = tokenizer.backend_tokenizer
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
