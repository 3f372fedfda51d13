"""Text that stays text: encoding in which only the template can write control tokens.

A tokenizer finds its control tokens (`<|im_end|>`, `</s>`) by their names. Here it gets a copy of itself in which they
have secret names; the template writes those, and what a user wrote is ordinary text whatever it looks like. All else is
the tokenizer's own, so ordinary text gets the ids that it always had.
"""

from __future__ import annotations

import json
import re
import secrets
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer

from parrot_sys.data.parts import ControlTokens, Part, check_text
from parrot_sys.errors import CheckpointError

T = TypeVar("T")
_LETTERS = string.ascii_lowercase + string.digits
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte without a token of its own


class TextTokenizer(Protocol):
    """A tokenizer as encoding needs it: one of transformers, or a `BareTokenizer`."""

    @property
    def backend_tokenizer(self) -> Any:
        """The one of the tokenizers library."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Id -> token that was added to the vocabulary."""

    @property
    def bos_token_id(self) -> Any:
        """Begin of sequence; None where there is none."""

    @property
    def eos_token_id(self) -> Any:
        """End of sequence; None where there is none."""


def control_tokens(tokenizer: TextTokenizer) -> dict[str, int]:
    """Name -> id of every added token that text must not become.

    These are the special ones and all others but words and white space, with which some vocabularies were extended.
    Byte fallback's tokens are not among them: bytes get their ids too.
    """
    return {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if (token.special or not _is_word(token.content)) and not _BYTE.fullmatch(token.content)
    }


class TextEncoder:
    """Ids of texts and of parts."""

    def __init__(self, tokenizer: TextTokenizer, control: ControlTokens = "text") -> None:
        """
        Args:
            tokenizer: of the tokenizers library.
            control: what a control token's name in a text is: `text`, or `parsed` to be the token, as in the released
                code.
        """
        self._backend: Any = tokenizer.backend_tokenizer
        self._spelled: dict[str, str] = {}  # text of the template -> with the secret names
        self._names: dict[str, str] = {}
        if control == "text":
            tokens = control_tokens(tokenizer)
            self._names = {name: _secret_name() for name in tokens}
            self._backend = _renamed(self._backend, self._names)
            for name, number in tokens.items():
                if (got := self._backend.token_to_id(self._names[name])) != number:
                    raise CheckpointError(f"tokenizer: token {name} must have the id {number}, got {got}")
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, runs: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Ids of each run of parts without images; none are added.

        Raises:
            DataError: a text has no UTF-8.
        """
        return self._each(runs, _ids_of)

    def count(self, runs: Sequence[Sequence[Part]]) -> list[int]:
        """How many ids each run has; quicker than `encode`, and raises as it does."""
        return self._each(runs, len)

    def _each(self, runs: Sequence[Sequence[Part]], take: Callable[[Any], T]) -> list[T]:
        """Result of `take` for the encoding of each run."""
        texts = ["".join([self._spell(text) if kind == "template" else text for text, kind in run]) for run in runs]
        unique = list(dict.fromkeys(texts))  # headers and system turns are the same in most conversations
        try:
            encoded = self._backend.encode_batch_fast(unique, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for part in (part for run in runs for part in run):
                check_text(part.text)
            raise
        found = {text: take(encoding) for text, encoding in zip(unique, encoded, strict=True)}
        return [found[text] for text in texts]

    def _spell(self, text: str) -> str:
        """Text of the template with the secret names."""
        found = self._spelled.get(text)
        if found is None:
            found = self._spelled[text] = self._pattern.sub(lambda name: self._names[name.group()], text)
        return found


def _ids_of(encoding: Any) -> list[int]:
    ids: list[int] = encoding.ids
    return ids


def _secret_name() -> str:
    """A word that nobody guesses (67 bits), in letters that no tokenizer changes; short, since it is read as text is.

    Every control token of a conversation is written with it.
    """
    return f"q{''.join(secrets.choice(_LETTERS) for _ in range(13))}q"


def _is_word(name: str) -> bool:
    return all(c.isalnum() or c.isspace() or unicodedata.category(c).startswith("M") for c in name)


def _renamed(backend: Any, names: Mapping[str, str]) -> Tokenizer:
    """A copy of a tokenizer with other names for some tokens."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    spec["added_tokens"] = [
        entry | {"content": names.get(entry["content"], entry["content"])}
        for entry in spec["added_tokens"]
        if not _BYTE.fullmatch(entry["content"])
    ]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if (unknown := model.get("unk_token")) is not None:
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:  # without those that would write a control token
        model["merges"] = [pair for pair in model["merges"] if not _names_one_of(pair, names)]
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(spec))


def _names_one_of(pair: Sequence[str] | str, names: Mapping[str, str]) -> bool:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in names or right in names or left + right in names
