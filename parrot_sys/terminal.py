"""Standard streams that no text, byte or closed pipe ends a program with."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from parrot_sys.errors import ParrotError

CLOSED_PIPE_STATUS = 141
"""Exit status when nobody reads standard output any more: what a shell reports of a program that SIGPIPE ended."""


class OutputClosedError(BrokenPipeError):
    """Nobody reads standard output any more."""


class OutputError(ParrotError):
    """Standard output cannot be written, for example onto a full disk."""


class _Stream(io.TextIOWrapper):
    """Shows a character that the stream's encoding lacks as an escape; after an error, writes to nowhere.

    A program must not end, and lose its work, because nobody reads its messages: errors of standard error are dropped.
    """

    def __init__(self, stream: io.TextIOWrapper, *, silent: bool) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._silent = silent
        self._original = stream  # it closes the buffer when it goes

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _to_nowhere(self.fileno())
        if self._silent:
            return
        if isinstance(error, BrokenPipeError):
            raise OutputClosedError(*error.args) from None
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Makes standard streams safe to use, and writes what is left in standard output at the end.

    Streams that are closed from the start lead nowhere. Input that cannot be decoded becomes surrogates, which
    `read_line` and whoever encodes text know. Streams that somebody put in place of the standard ones stay as they are.

    Raises:
        OutputClosedError: nobody reads standard output any more.
        OutputError: standard output cannot be written.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # (the lowest free descriptor is the stream's own)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end
    if sys.stdin is sys.__stdin__ and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stream(sys.stdout, silent=False)
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stream(sys.stderr, silent=True)
    try:
        yield
    finally:
        sys.stdout.flush()


def read_line(prompt: str) -> str:
    """A line of standard input, as UTF-8 where the stream's own encoding does not fit; the rest are surrogates.

    Raises:
        EOFError: there is none.
    """
    line = input(prompt)
    if not _torn(line):
        return line
    return line.encode(sys.stdin.encoding, "surrogateescape").decode("utf-8", "surrogateescape")


def _torn(text: str) -> bool:
    return any(0xDC80 <= ord(character) <= 0xDCFF for character in text)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
