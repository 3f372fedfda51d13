"""Kinds of data sets. A new one is a file in this folder and a line here."""

from __future__ import annotations

from pathlib import Path

from parrot_sys.data.sources.arrow_files import ArrowRecords
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.columns import MappedRecords, find_columns
from parrot_sys.data.sources.energon import EnergonRecords
from parrot_sys.data.sources.json_files import JsonRecords
from parrot_sys.data.sources.parquet_files import ParquetRecords
from parrot_sys.data.sources.webdataset import WebDatasetRecords

SOURCES: tuple[type[RecordSource], ...] = (
    EnergonRecords,
    ArrowRecords,
    ParquetRecords,
    WebDatasetRecords,
    JsonRecords,
)
"""In the order in which they are asked; the last one takes every path."""


def open_source(path: Path) -> RecordSource:
    """The data set at a path. Nothing is read yet but whether there is a file of columns."""
    source = next(kind for kind in SOURCES if kind.takes(path))(path)
    columns = find_columns(path)
    return source if columns is None else MappedRecords(source.rows(), columns)
