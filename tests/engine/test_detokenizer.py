"""Streaming text equals the text of all tokens, with every kind of tokenizer, and never shows what it may take back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.engine.detokenizer import Detokenizer, StopStrings
from parrot_sys.errors import ConfigError
from tests.data.tokenizers_of_all_kinds import KINDS, make_tokenizer

TEXTS = st.text(
    st.sampled_from("abc  .,\n\u4ec0\u9ebc\u00e9\U0001f99c\ufffd\u0645\u0631\u200d"), min_size=1, max_size=25
)


def stream(kind: str, ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = Detokenizer(make_tokenizer(kind))
    bounds = [0, *sorted({cut for cut in cuts if cut < len(ids)}), len(ids)]
    return [detokenizer.push(ids[start:stop]) for start, stop in pairwise(bounds)] + [detokenizer.finish()]


def decoded(kind: str, ids: list[int]) -> str:
    return make_tokenizer(kind).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 30), max_size=6))
def test_pieces_of_a_text_are_the_text(kind: str, text: str, cuts: list[int]) -> None:
    ids = make_tokenizer(kind).encode(text, add_special_tokens=False)
    whole, pieces = decoded(kind, ids), stream(kind, ids, cuts)
    assert "".join(pieces) == whole
    for count in range(len(ids) + 1):  # the same from one token at a time
        shown = "".join(stream(kind, ids, list(range(1, len(ids))))[:count])
        assert whole.startswith(shown)
        assert shown.count("\ufffd") <= whole.count("\ufffd")


@pytest.mark.parametrize("kind", ["byte_level", "added", "llama3"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_at_all(kind: str, data: st.DataObject) -> None:
    """Models may write bytes that are no text, special tokens in the middle, or end within a character."""
    size = len(make_tokenizer(kind))
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.sampled_from([size - 1, size - 2]), max_size=12))
    assert "".join(stream(kind, ids, list(range(1, len(ids))))) == decoded(kind, ids)


@pytest.mark.parametrize("kind", ["byte_level", "added", "llama3"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_long_runs_of_any_tokens(kind: str, data: st.DataObject) -> None:
    """Runs of special tokens and of bytes that never become a character, with text between them."""
    size = len(make_tokenizer(kind))
    token = st.integers(0, size - 1) | st.sampled_from([size - 1, size - 2])
    runs = data.draw(st.lists(st.tuples(st.lists(token, min_size=1, max_size=3), st.integers(1, 30)), max_size=4))
    ids = [own for run, count in runs for own in run * count]
    assert "".join(stream(kind, ids, list(range(1, len(ids))))) == decoded(kind, ids)


class CountingDecoder:
    """A tokenizer's `decode` that counts how many tokens it is given."""

    def __init__(self, kind: str) -> None:
        self.tokens = 0
        self._tokenizer = make_tokenizer(kind)

    def decode(self, token_ids: list[int], **options: bool) -> str:
        self.tokens += len(token_ids)
        return self._tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_work_grows_with_the_tokens(kind: str, data: st.DataObject) -> None:
    """Whatever a model repeats, also special tokens and bytes that never become a character."""
    size = len(make_tokenizer(kind))
    token = st.integers(0, size - 1) | st.sampled_from([size - 1, size - 2])
    opening, repeated = data.draw(st.lists(token, max_size=2)), data.draw(st.lists(token, min_size=1, max_size=3))
    work = []
    for count in (40, 80):
        decoder = CountingDecoder(kind)
        Detokenizer(decoder).push([*opening, *repeated * count])
        work.append(decoder.tokens)
    assert work[1] <= 2.6 * work[0] + 50


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    """There, bytes of a character that is not complete hide those of the characters before it."""
    tokenizer = make_tokenizer("metaspace")
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\U0001f99c\u4f60\u4f60".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in ids] == [*[""] * 3, "\U0001f99c", *[*[""] * 2, "\u4f60"] * 2]
    assert detokenizer.push(ids[:1]) == ""
    assert detokenizer.push(tokenizer.encode("a", add_special_tokens=False)[-1:]) == "\ufffd a"
    assert detokenizer.finish() == ""


def test_special_tokens_between_the_bytes_of_a_character() -> None:
    """They are left out however many there are, and the character is whole."""
    tokenizer = make_tokenizer("llama3")
    first, *rest = (tokenizer.convert_tokens_to_ids(name) for name in ("\u00e0", "<|begin_of_text|>", "\u00a1"))
    ids = [first, *[rest[0]] * 40, rest[1], *[rest[0]] * 40, rest[1]]
    assert "".join(stream("llama3", ids, list(range(1, len(ids))))) == decoded("llama3", ids) == "\u0861"


def test_a_character_that_never_comes_is_not_lost() -> None:
    tokenizer = make_tokenizer("byte_level")
    half = tokenizer.encode("\U0001f99c", add_special_tokens=False)[:2]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in half] == ["", ""]
    assert detokenizer.finish() == "\ufffd"


def first_stop(text: str, strings: list[str]) -> tuple[str, str | None]:
    """By definition: the text before the first stop string that is complete, the longest of several."""
    for end in range(len(text) + 1):
        found = [own for own in strings if text[:end].endswith(own)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


LETTERS = st.text(st.sampled_from("ab\u4ec0"), max_size=14)
STOPS = st.lists(st.text(st.sampled_from("ab\u4ec0"), min_size=1, max_size=4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, strings=STOPS, cuts=st.lists(st.integers(1, 13), max_size=6), keep=st.booleans())
def test_stop_strings_across_pieces(text: str, strings: list[str], cuts: list[int], keep: bool) -> None:
    stops = StopStrings(strings, keep=keep)
    bounds = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    wanted, found = first_stop(text, strings)
    shown = ""
    for start, stop in pairwise(bounds):
        shown += stops.push(text[start:stop])
        assert (wanted + (found or "") * keep).startswith(shown), "no part of a stop string is shown"
    shown += stops.finish()
    assert (shown, stops.found) == (wanted + (found or "") * keep, found)


def test_text_that_cannot_begin_a_stop_string_does_not_wait() -> None:
    stops = StopStrings(["\n\n", "END"])
    assert [stops.push(piece) for piece in ("one\n", "E", "N", "D of")] == ["one", "\nE"[:1], "", ""]
    assert stops.found == "END"
    assert StopStrings().push("anything") == "anything"


def test_empty_stop_strings() -> None:
    with pytest.raises(ConfigError, match="must not be empty"):
        StopStrings(["a", ""])
