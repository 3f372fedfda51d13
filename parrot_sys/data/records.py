"""Records in LLaVA/Parrot format, checked one by one: what is wrong is named with file, record and reason.

A record is `{"id"?, "image"?: name or list of names, "lang"?, "conversations": [{"from", "value", "input"?}, ...]}`;
`input` is a text that the instruction of a human turn is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.templates import ROLE_NAMES
from parrot_sys.errors import DataError, printable


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation that passed all checks except those of its image files."""

    index: int
    """Place in the file, from 0."""
    record_id: str
    language: str
    images: tuple[str, ...]
    """File names as the record gives them, one for each image marker, in order."""
    turns: tuple[dict[str, str], ...]


def describe_record(path: Path, index: int, record_id: Any = None) -> str:
    """Where a record is, for messages."""
    return f"{printable(path)}: record {index}" + (f" (id {record_id!r})" if record_id is not None else "")


def read_raw_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of a file with one JSON value a line (.jsonl).

    A line that is no JSON is yielded as a DataError in its place: one broken line costs one record.

    Raises:
        DataError: the file is missing, is no JSON, or holds no list.
    """
    if not path.is_file():
        raise DataError(f"data set {path} is missing; data.paths must name JSON or JSONL files")
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (_parse_line(line) for line in lines if line.strip())
            return
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError
        raise DataError(
            f"data set {path} is no valid JSON: {error}; files with one record a line end in .jsonl"
        ) from None
    if not isinstance(records, list):
        raise DataError(f"data set {path} must hold a JSON list of records, got {type(records).__name__}")
    yield from records


def parse_record(raw: Any, index: int, path: Path, *, language: str = "") -> Record:
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
        images = _parse_images(raw.get("image"))
        turns = _parse_turns(raw.get("conversations"))
        markers = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
        if markers != len(images):
            raise DataError(
                f"must have one {IMAGE_TOKEN} marker for each image, got {markers} markers and {len(images)} images"
            )
        stated = raw.get("lang", language)
        if not isinstance(stated, str):
            raise DataError(f"`lang` must be a string, got {stated!r}")
    except DataError as error:
        raise DataError(f"{describe_record(path, index, record_id)}: {error}") from None
    return Record(index, str(index if record_id is None else record_id), stated, images, turns)


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return DataError(f"is no valid JSON: {error}")


def _parse_images(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"`image` must be a file name or a list of file names, got {value!r}")
    return tuple(names)


def _parse_turns(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"`conversations` must be a list with at least one turn, got {_short(value)}")
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise DataError(f"turn {i} must have strings in `from` and `value`, got {_short(turn)}")
        if turn["from"] not in ROLE_NAMES:
            raise DataError(f"turn {i}: `from` must be one of {', '.join(ROLE_NAMES)}, got {turn['from']!r}")
        if IMAGE_TOKEN in turn["value"] and turn["from"] != "human":
            raise DataError(
                f"turn {i}: an {IMAGE_TOKEN} marker must stand in a human turn, got one in a {turn['from']} turn"
            )
        if "input" in turn and (turn["from"] != "human" or not isinstance(turn["input"], str)):
            raise DataError(f"turn {i}: `input` must be a string in a human turn, got {_short(turn)}")
        if IMAGE_TOKEN in turn.get("input", ""):
            raise DataError(f"turn {i}: `input` must hold no {IMAGE_TOKEN} marker; put it into `value`")
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise DataError(f"turn {i}: the answer must not be empty")
    dialogue = value[1:] if value[0]["from"] == "system" else value
    roles = [turn["from"] for turn in dialogue]
    if "gpt" not in roles:
        raise DataError(f"must have at least one answer (a gpt turn), got {', '.join(roles) or 'a system turn only'}")
    if roles != ["human", "gpt"] * (len(roles) // 2):
        raise DataError(f"turns must be human and gpt in turn, after at most one system turn, got {_short(roles)}")
    return tuple({key: turn[key] for key in ("from", "value", "input") if key in turn} for turn in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
