"""Records, checked one by one: what is wrong is named with file, record and reason.

A record is `{"id"?, "image"?: name or list of names, "lang"?, "category"?, "conversations": [{"from", "value",
"input"?}, ...]}`, as LLaVA and Parrot have it, or in another layout (`layouts.py`); `input` is a text that the
instruction of a human turn is about, `category` that of what the images show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.languages import canonical
from parrot_sys.data.layouts import parse_layout, valid_text
from parrot_sys.errors import DataError, printable


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation that passed all checks except those of its image files."""

    index: int
    """Place in the file, from 0."""
    record_id: str
    language: str
    """BCP 47 code in its usual form; as the record states it where that is no code; empty where none is stated."""
    images: tuple[str, ...]
    """File names as the record gives them, one for each image marker, in order."""
    turns: tuple[dict[str, Any], ...]
    text_markers: int = 0
    """How many `<image>` in its texts are just text."""
    category: str = ""
    """Of what its images show; reports on routes group by it."""


def describe_record(path: Path | str, index: int, record_id: Any = None) -> str:
    """The place of a record, for messages."""
    return f"{printable(path)}: record {index}" + (f" (id {record_id!r})" if record_id is not None else "")


def parse_record(raw: Any, index: int, path: Path | str, *, language: str = "") -> Record:
    """Checks one record.

    Args:
        raw: what `read_raw_records` yielded.
        index: its place in the file.
        path: the file, for messages.
        language: language of records that state none.

    Raises:
        DataError: names file, record and reason.
    """
    record_id = raw.get("id") if isinstance(raw, Mapping) else None
    try:
        if isinstance(raw, DataError):
            raise raw
        if not isinstance(raw, Mapping):
            raise DataError(f"must be a JSON object, got {type(raw).__name__}")
        turns, images, text_markers = parse_layout(raw)
        stated = language if raw.get("lang") is None else raw["lang"]
        if not isinstance(stated, str):
            raise DataError(f"`lang` must be a string, got {stated!r}")
        for field, text in (("lang", stated), ("id", str(record_id))):
            valid_text(text, f"`{field}`")
    except DataError as error:
        raise DataError(f"{describe_record(path, index, record_id)}: {error}") from None
    name = str(index if record_id is None else record_id)
    category = raw.get("category")  # other people's files may mean anything else by this name
    return Record(
        index,
        name,
        canonical(stated) or stated,
        images,
        tuple(turns),
        text_markers,
        category if isinstance(category, str) else "",
    )


def content_digest(record: Record) -> int:
    """Hash of texts and image names, 64 bits; the same in every Python."""
    content = json.dumps([record.turns, record.images, record.category]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
