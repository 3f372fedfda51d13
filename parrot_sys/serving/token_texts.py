"""Tokens as texts and bytes, for log-probabilities, and places of tokens in the text of an answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from parrot_sys.engine.detokenizer import Detokenizer

_REPLACEMENT = "\ufffd"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"  # in vocabularies of SentencePiece
_BYTE_OF = {character: number for number, character in bytes_to_unicode().items()}


class TokenTexts:
    """Texts and bytes of single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            tokenizer: of the model.
        """
        self.tokenizer: Any = tokenizer
        self._control = frozenset(self.tokenizer.all_special_ids)
        self.data = functools.lru_cache(maxsize=2**16)(self._data)
        self.text = functools.lru_cache(maxsize=2**16)(self._text)

    def is_control(self, token: int) -> bool:
        """Whether a token has no text that anybody sees."""
        return token in self._control

    def _data(self, token: int) -> bytes:
        """Bytes of a token, also of one that is only a part of a character."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        text: str = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if name is None:
            return b""  # (a vocabulary may be padded)
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        if _REPLACEMENT in text and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        if name.startswith(_WORD_START) and not text.startswith(" "):
            text = " " + text
        return text.encode()

    def _text(self, token: int) -> str:
        """Text of a token; `bytes:\\xe4\\xbd` where it is only a part of a character."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Text that each token of a text completes; joined, they are the text without control tokens."""
        detokenizer = Detokenizer(self.tokenizer)
        pieces = [detokenizer.push([token]) for token in tokens]
        if pieces:
            pieces[-1] += detokenizer.finish()
        return pieces
