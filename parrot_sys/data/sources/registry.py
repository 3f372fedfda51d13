"""Kinds of data sets. A new one is a file in this folder and a line here."""

from __future__ import annotations

from pathlib import Path

from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.json_files import JsonRecords

SOURCES: tuple[type[RecordSource], ...] = (JsonRecords,)
"""In the order in which they are asked; the last one takes every path."""


def open_source(path: Path) -> RecordSource:
    """The data set at a path. Nothing is read yet."""
    return next(kind for kind in SOURCES if kind.takes(path))(path)
