"""Errors that a user can act on: each names the setting or record, what was wanted, what came, and the fix."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, changes of writing direction, halves of surrogate pairs."""


def printable(text: object, *, keep: str = "") -> str:
    """A text with its control characters escaped: names from other people's files must not steer a terminal or a log.

    Args:
        text: anything; its `str` is taken.
        keep: control characters that stay as they are.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"

    return _CONTROLS.sub(escape, str(text))


class ParrotError(Exception):
    """Base of all errors that this package raises for users. Control characters in its message come out escaped."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class ConfigError(ParrotError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class DataError(ParrotError, ValueError):
    """A record, image or data set is missing, broken or inconsistent; the message names file, record and reason."""


class ImageTooLargeError(DataError):
    """A picture is larger than pictures may be."""


class StorageError(DataError):
    """A file that holds the data of many samples is damaged or has changed: no fault of a sample, so that leaving the
    sample out is no answer."""


class CheckpointError(ParrotError, ValueError):
    """A checkpoint is missing, damaged or does not fit the model; the message lists the keys."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written, for example onto a full disk; those before it are as they were."""


class BusyError(ParrotError):
    """More requests wait for an answer than may; the same request may be taken later."""
