"""Tokenizers of other people's checkpoints: read without running code or using a network, and checked."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from parrot_sys.data.templates import CHATML, LLAMA3, VICUNA, Template
from parrot_sys.errors import CheckpointError
from parrot_sys.files import errors_named, read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS = "tokenizer_config.json"


def load_tokenizer(path: str | Path, template: Template = CHATML) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in a directory, with the special tokens of a template checked. Uses no network.

    Raises:
        CheckpointError: no tokenizer there, one that cannot be read or needs code of its own, or it lacks one of the
            special tokens.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"tokenizer: {path} must be a directory with tokenizer.json or vocab.json and merges.txt")
    tokenizer = _read(Path(path))
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"tokenizer: {path} must hold one of the tokenizers library, got {type(tokenizer).__name__}"
        )
    with errors_named(f"tokenizer: {path}", what="does not work"):
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        for token in template.special_tokens:
            if (got := backend.encode(token, add_special_tokens=False).ids) != [backend.token_to_id(token)]:
                raise CheckpointError(
                    f"tokenizer: {path} must have the special token {token}, got {len(got)} ids for it"
                )
        if template.end_token is not None:
            tokenizer.eos_token = template.end_token
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"tokenizer: {path} must have an end-of-sequence token for the {template.name} template"
            )
        tokenizer.pad_token = template.pad_token or tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _read(path: Path) -> PreTrainedTokenizerBase:
    if (path / _SETTINGS).is_file():
        read_json(path / _SETTINGS)  # is an object that asks for no code
    with errors_named(f"tokenizer: {path}", what="holds none that can be read"):
        # An empty config keeps transformers from warning that it does not know model_type parrot_qwen2.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, config=PreTrainedConfig()
        )
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """Whether a directory holds a tokenizer of any kind."""
    return any((Path(path) / name).is_file() for name in _TOKENIZER_FILES)


def template_of_tokenizer(path: str | Path) -> Template:
    """Format of conversations that a tokenizer has the tokens of, for checkpoints that do not name theirs.

    Raises:
        CheckpointError: the files cannot be read.
    """
    if not has_tokenizer(path):
        return CHATML
    known = _read(Path(path)).get_vocab()
    return next((t for t in (CHATML, LLAMA3) if all(token in known for token in t.special_tokens)), VICUNA)


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


def with_added_tokens(path: str | Path, tokens: Sequence[str]) -> PreTrainedTokenizerBase | None:
    """A tokenizer with more tokens (and `<PAD>`, if it has no padding) after its own.

    Args:
        path: directory; the result is None when it holds no tokenizer.
        tokens: in the order of their ids.

    Raises:
        CheckpointError: the files cannot be read.
    """
    if not has_tokenizer(path):
        return None
    tokenizer = _read(Path(path))
    # (As the released code adds them: first these, then the padding.)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase | MissingTokenizer, vocab_size: int, where: object) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has ids that the model's embedding has no rows for; names them.
    """
    if isinstance(tokenizer, MissingTokenizer):
        return
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    if beyond:
        first = sorted(beyond.items(), key=lambda item: item[1])
        named = ", ".join(f"{reprlib.repr(token)} = {index}" for token, index in first[:5])
        raise CheckpointError(
            f"tokenizer: {where} has {len(beyond)} tokens beyond the model's vocabulary of {vocab_size} rows: {named}"
            f"{', ...' if len(beyond) > 5 else ''}; use the tokenizer of this model, or give the embedding more rows"
        )
