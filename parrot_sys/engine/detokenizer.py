"""Streaming text: tokens in, text that will not change any more out, up to a stop string.

Text is held back as long as the next token may change it: bytes that are not yet a whole character decode to U+FFFD, so
a text that ends with that waits (a U+FFFD that the model really wrote comes with the next token, or at the end). What
may be the beginning of a stop string waits as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parrot_sys.errors import ConfigError

_REPLACEMENT = "\ufffd"
_MOST_WAITING = 16
"""Tokens that wait for the end of a character; of more, the first ones are given out as they are."""
_UNFINISHED = 3
"""Most tokens that a character which is not complete takes: it has four bytes at most, and a token one at least."""


class TextDecoder(Protocol):
    """The part of a tokenizer of transformers that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Text of some tokens."""


class Detokenizer:
    """Text of one answer, token by token. All pieces together are the text of all tokens.

    Only a window of the last tokens is decoded each time. It begins with a token whose text is complete and not empty,
    as tokenizers may treat the first token of a text in another way than later ones (a leading space).
    """

    def __init__(self, tokenizer: TextDecoder, *, skip_special_tokens: bool = True) -> None:
        """
        Args:
            tokenizer: decodes.
            skip_special_tokens: leave tokens like the end of a turn out.
        """
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._complete = 0  # tokens of the window whose text was given out, all of it
        self._given = ""  # text of the window that was given out

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens; returns text that is certain now, often none."""
        pieces = []
        for token in tokens:
            self._window.append(token)
            pieces.append(self._give(final=False))
            if len(self._window) - self._complete > _MOST_WAITING:
                pieces.append(self._settle())
        return "".join(pieces)

    def finish(self) -> str:
        """Returns the rest of the text, after the last token."""
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        text = self._decode(self._window)
        certain = text if final else text.rstrip(_REPLACEMENT)
        if not certain.startswith(self._given):
            if len(certain) < len(self._given) and not final:
                return ""  # bytes of a character that is not complete yet may hide those before them
            # Bytes that never became a character do so for good: the text begins anew after what was complete.
            del self._window[: self._complete]
            self._complete, self._given = 0, ""
            text = self._decode(self._window)
            certain = text if final else text.rstrip(_REPLACEMENT)
        piece, self._given = certain[len(self._given) :], certain
        if certain == text:
            self._advance()
        return piece

    def _advance(self) -> None:
        """Lets the window begin with the tokens that came last, or the one before them, if they have a text of their
        own; lets go of those that are left out."""
        newest = self._window[self._complete :]
        if newest and self._is_left_out(newest):
            del self._window[self._complete :]
            return
        for first in (self._complete, self._complete - 1):
            own = self._decode(self._window[first:]) if newest and first > 0 else ""
            # (The token before them may begin within a character.)
            whole = first == self._complete or not own.startswith(_REPLACEMENT)
            if own and whole and not own.endswith(_REPLACEMENT):
                self._window, self._given = self._window[first:], own
                break
        self._complete = len(self._window)

    def _settle(self) -> str:
        """Ends the wait of tokens for the end of a character, as far as no later token can change their text: else a
        long run of bytes that are no text would be decoded again with every token."""
        waiting = [token for token in self._window[self._complete :] if not self._is_left_out([token])]
        del self._window[self._complete :]
        self._window += waiting
        if len(waiting) <= _MOST_WAITING:  # (bytes of a character may have such tokens between them)
            return ""
        whole, given = self._decode(waiting), self._given[len(self._decode(self._window[: self._complete])) :]
        for count in range(_UNFINISHED, 2 * _UNFINISHED):
            # (With the first one where a byte that is no text spoils all that follow it, as in SentencePiece.)
            for rest in (waiting[-count:], [waiting[0], *waiting[-count:]]):
                tail = self._decode(rest)
                text = tail.lstrip(_REPLACEMENT)
                # From a character on that is one also without the tokens before; all of it where there is none.
                begin = len(tail) - len(text) if text else 0
                if tail and whole.endswith(tail[begin:]):
                    settled = whole[: len(whole) - len(tail) + begin]
                    self._window, self._complete = rest, 0
                    self._given = tail[:begin] + given[len(settled) :]
                    return settled[len(given) :]
        return ""

    def _is_left_out(self, tokens: list[int]) -> bool:
        return not self._decode(tokens) and bool(self._decode(tokens, skip=False))

    def _decode(self, tokens: list[int], *, skip: bool | None = None) -> str:
        left_out = self._skip if skip is None else skip
        return self._tokenizer.decode(tokens, skip_special_tokens=left_out, clean_up_tokenization_spaces=False)


class StopStrings:
    """Ends a text at the first of some strings to be complete, however the text is cut into pieces."""

    def __init__(self, strings: Sequence[str] = (), *, keep: bool = False) -> None:
        """
        Args:
            strings: each ends the text. Of several that are complete at the same place, the longest counts.
            keep: whether the string that ended the text is part of it.

        Raises:
            ConfigError: one of them is empty.
        """
        if not all(strings):
            raise ConfigError(f"stop strings must not be empty, got {list(strings)}")
        self._strings = tuple(strings)
        self._keep = keep
        self._held = ""
        self.found: str | None = None
        """The string that ended the text."""

    def push(self, text: str) -> str:
        """Takes more text; returns what is certainly before any stop string. Nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.find(own) + len(own), -len(own), own) for own in self._strings if own in text]
        if ends:
            stop, _, self.found = min(ends)
            self._held = ""
            return text[: stop if self._keep else stop - len(self.found)]
        certain = len(text) - self._overlap(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Returns what was held back, after the last text."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, text: str) -> int:
        """Characters at the end of a text that may begin a stop string; the longest such end."""
        longest = max((len(own) for own in self._strings), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(own.startswith(text[start:]) for own in self._strings):
                return len(text) - start
        return 0
