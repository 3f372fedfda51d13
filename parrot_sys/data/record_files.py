"""Records of a file one after the other, however large it is: a JSON list, or one JSON value a line."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from parrot_sys.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_CHUNK = 1 << 20  # characters read at once
_CERTAIN = 1000  # an error so many characters before the end of what was read is not the end's
_SPACE = re.compile(r"[ \t\r\n]*")


def read_raw_records(path: Path, on_progress: Callable[[int], None] = lambda read: None) -> Iterator[Any]:
    """The records of a JSON list, or of a file with one JSON value a line (.jsonl).

    A byte order mark is left out. A line that is no JSON is yielded as a DataError in its place: one broken line costs
    one record. Bytes that are no UTF-8 become surrogates, which `parse_record` refuses: they cost one record too.

    Args:
        path: the file.
        on_progress: called before each record with the bytes read so far.

    Raises:
        DataError: the file is missing, cannot be read, is no JSON, or holds no list.
    """
    if not path.is_file():
        raise DataError(f"data set {path} is missing; data.paths must name JSON or JSONL files")
    try:
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
            file.seek(0)
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            # (Nothing but \n ends a line: JSON may hold other separators in its strings.)
            text = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="\n")
            for record in _records(text, path):
                on_progress(file.tell())
                yield record
    except (OSError, ValueError, RecursionError) as error:  # ValueError: json.JSONDecodeError, UnicodeDecodeError, ...
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data set {path} is no valid JSON: {_reason(error)}; files with one record a line end in .jsonl"
        ) from None


def _records(text: TextIO, path: Path) -> Iterator[Any]:
    if path.suffix.lower() in LINE_SUFFIXES:
        return _lines(text)
    stream = _JsonText(text)
    if stream.peek() == "{" and (first := stream.lines()) is not None:
        return _lines(itertools.chain(first, text))
    if stream.peek() != "[":
        raise DataError(f"data set {path} must hold a JSON list of records, got {type(stream.value()).__name__}")
    return stream.items()


def _lines(lines: Iterator[str] | TextIO) -> Iterator[Any]:
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield DataError(f"is no valid JSON: {_reason(error)}")


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


class _JsonText:
    """Reads JSON values from a text, of which only a part is in memory."""

    def __init__(self, text: TextIO) -> None:
        self._file = text
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0  # what was read and not yet taken begins at `_at`
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None, "the pattern matches anything"
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def lines(self) -> list[str] | None:
        """The text read so far, to the end of its last line, if the first line is a JSON value and not the only one."""
        while "\n" not in self._text and self._more():
            pass
        line, _, rest = self._text.partition("\n")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return None
        while not rest.strip() and self._more():
            rest = self._text.partition("\n")[2]
        return (self._text + self._file.readline()).split("\n") if rest.strip() else None

    def items(self) -> Iterator[Any]:
        """The entries of a list."""
        self._at += 1  # the bracket
        if self.peek() != "]":
            for number in itertools.count():
                try:
                    yield self.value()
                except json.JSONDecodeError as error:
                    raise ValueError(f"{error.msg} in record {number}") from None
                if (found := self.peek()) != ",":
                    break
                self._at += 1
            if found != "]":
                raise ValueError(f"wanted , or ] after record {number}, got {found or 'the end of the file'}")
        self._at += 1
        if self.peek():
            raise ValueError("something follows the end of the list")

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                begun = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CERTAIN
                if not begun or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def _more(self) -> bool:
        """Reads on; as much again as there is, so that a long value is not tried too often."""
        chunk = "" if self._ended else self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not chunk
        self._text, self._at = self._text[self._at :] + chunk, 0
        return not self._ended
