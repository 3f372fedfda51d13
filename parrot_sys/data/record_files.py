"""Records of a file one after the other, however large it is: a JSON list, or one JSON value a line."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from parrot_sys.errors import DataError

LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_CHUNK = 1 << 20  # characters read at once
_CERTAIN = 1000  # an error so many characters before the end of what was read is not the end's
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoding of a record file."""

    name: str
    mark: int
    """Bytes of the byte order mark."""

    @property
    def errors(self) -> str:
        """Bytes that are no UTF-8 become surrogates, which `parse_record` refuses: they cost one record."""
        return "surrogateescape" if self.name == "utf-8" else "strict"

    def decode(self, data: bytes) -> str:
        """Text of a stretch of the file."""
        return data.decode(self.name, self.errors)

    def size(self, text: str) -> int:
        """Bytes that a text of the file takes there."""
        return len(text.encode(self.name, self.errors))


def check_exists(path: Path) -> None:
    """
    Raises:
        DataError: there is no file of records at this path.
    """
    if path.is_dir():
        raise DataError(
            f"data set {path} is a folder without Parquet, Arrow or tar files; name its JSON files one by one, or read "
            "it as a stream (data.stream.enabled)"
        )
    if not path.is_file():
        raise DataError(
            f"data set {path} is missing; data.paths must name files, folders or patterns of JSON, JSON lines, "
            "Parquet, Arrow or tar"
        )


def detect_encoding(file: BinaryIO) -> Encoding:
    """Encoding of a file, from its first bytes."""
    head = file.read(4)
    name = json.detect_encoding(head)
    if name == "utf-8-sig":
        return Encoding("utf-8", len(codecs.BOM_UTF8))
    if name == "utf-16":
        return Encoding("utf-16-le" if head.startswith(codecs.BOM_UTF16_LE) else "utf-16-be", len(codecs.BOM_UTF16))
    if name == "utf-32":
        return Encoding("utf-32-le" if head.startswith(codecs.BOM_UTF32_LE) else "utf-32-be", len(codecs.BOM_UTF32))
    return Encoding(name, 0)


def parse_json(text: str) -> Any:
    """The value of a text; a DataError in its place where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"is no valid JSON: {_reason(error)}")


def read_raw_records(path: Path, on_progress: Callable[[int], None] = lambda read: None) -> Iterator[Any]:
    """The records of a JSON list, or of a file with one JSON value a line (.jsonl); see `scan_records`."""
    return (record for _, _, record in scan_records(path, on_progress))


def scan_records(path: Path, on_progress: Callable[[int], None] = lambda read: None) -> Iterator[tuple[int, int, Any]]:
    """(first byte, byte after the last, record) of each entry of a JSON list, or each line of a file of JSON lines.

    A byte order mark is left out. A line that is no JSON is yielded as a DataError in its place: one broken line costs
    one record. Bytes that are no UTF-8 become surrogates, which `parse_record` refuses: they cost one record too.

    Args:
        path: the file.
        on_progress: called before each record with the bytes read so far.

    Raises:
        DataError: the file is missing, cannot be read, is no JSON, or holds no list.
    """
    check_exists(path)
    try:
        with path.open("rb") as file:
            encoding = detect_encoding(file)
            file.seek(encoding.mark)
            # (Nothing but \n ends a line: JSON may hold other separators in its strings.)
            text = io.TextIOWrapper(file, encoding=encoding.name, errors=encoding.errors, newline="\n")
            for record in _records(text, path, encoding):
                on_progress(file.tell())
                yield record
    except (OSError, ValueError, RecursionError) as error:  # ValueError: json.JSONDecodeError, UnicodeDecodeError, ...
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data set {path} is no valid JSON: {_reason(error)}; files with one record a line end in .jsonl"
        ) from None


def _records(text: TextIO, path: Path, encoding: Encoding) -> Iterator[tuple[int, int, Any]]:
    if path.suffix.lower() in LINE_SUFFIXES:
        return _lines(text, encoding)
    stream = _JsonText(text, encoding)
    if stream.peek() == "{" and (first := stream.lines()) is not None:
        return _lines(itertools.chain(first, text), encoding, stream.position)
    if stream.peek() != "[":
        raise DataError(f"data set {path} must hold a JSON list of records, got {type(stream.value()).__name__}")
    return stream.items()


def _lines(
    lines: Iterator[str] | TextIO, encoding: Encoding, start: int | None = None
) -> Iterator[tuple[int, int, Any]]:
    start = encoding.mark if start is None else start
    for line in lines:
        end = start + encoding.size(line)
        if line.strip():
            yield start, end, parse_json(line)
        start = end


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


class _JsonText:
    """Reads JSON values from a text, of which only a part is in memory."""

    def __init__(self, text: TextIO, encoding: Encoding) -> None:
        self._file, self._encoding = text, encoding
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0  # what was read and not yet taken begins at `_at`
        self._known = (0, encoding.mark)  # a place in `_text` and the byte of the file where it is
        self._ended = False

    @property
    def position(self) -> int:
        """Byte of the file where what was not yet taken begins."""
        at, byte = self._known
        self._known = self._at, byte + self._encoding.size(self._text[at : self._at])
        return self._known[1]

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
        self._cut()
        while "\n" not in self._text and self._more():
            pass
        line, _, rest = self._text.partition("\n")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return None
        while not rest.strip() and self._more():
            rest = self._text.partition("\n")[2]
        if not rest.strip():
            return None
        *whole, last = (self._text + self._file.readline()).split("\n")
        return [f"{line}\n" for line in whole] + [last]

    def items(self) -> Iterator[tuple[int, int, Any]]:
        """First byte, byte after the last, and value of each entry of a list."""
        self._at += 1  # the bracket
        if self.peek() != "]":
            for number in itertools.count():
                self.peek()
                start = self.position
                try:
                    value = self.value()
                except json.JSONDecodeError as error:
                    raise ValueError(f"{error.msg} in record {number}") from None
                yield start, self.position, value
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
        self._cut()
        self._text += chunk
        return not self._ended

    def _cut(self) -> None:
        """Drops what was taken."""
        self._known = 0, self.position
        self._text, self._at = self._text[self._at :], 0
