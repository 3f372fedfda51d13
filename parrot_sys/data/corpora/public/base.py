"""Forms of a public set: how its file is read, and what a row becomes."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.image_sources.data_urls import decode_base64
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.files import errors_named

Row = Mapping[str, Any]
Picture = Sequence[str] | bytes
"""A picture: names that it may have below the directory of images, likeliest first, or the bytes of its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as an instruction, before its image is looked for."""

    turns: Sequence[Mapping[str, str]]
    images: Sequence[str] = ()
    """Names that the image may have below the directory of images, likeliest first; none: no image."""
    record_id: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The picture, if there is one."""
        return (self.images,) if self.images else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A row of a set of questions, before its pictures are looked for."""

    question: str
    """May hold the image marker as often as there are pictures, also in hint and options; else they are in front."""
    options: Sequence[str] = ()
    """Texts of a multiple choice; none: an open question."""
    answer: int | str | None
    """Place of the right option, or the text of an answer; None where the set keeps it secret."""
    pictures: Sequence[Picture] = ()
    language: str = ""
    """Code, where the row says it."""
    hint: str = ""
    category: str = ""
    l2_category: str = ""
    record_id: str = ""


Convert = Callable[[Row, random.Random], Example | Question]
"""(row, generator of this row) -> example; raises DataError, KeyError or TypeError for a row of another form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One public set."""

    read: Callable[..., Iterator[Any]]
    """File -> rows. VQAv2's takes the questions' file as well."""
    convert: Convert
    has_images: bool
    images_inside: bool = False
    """Whether its rows may hold their pictures themselves, so that no directory is needed."""
    wanted: str
    """Form of a row, for messages."""
    language: str | None = "en"
    """Language of the set; None: rows say it, or the name of the file, or the user."""


def read_rows(path: Path) -> Iterator[Any]:
    """Rows of a Parquet file, of a JSON list, or of a file with one JSON value a line.

    Raises:
        DataError: the file is missing or damaged.
        ConfigError: pyarrow is not installed.
    """
    if path.suffix.lower() != ".parquet":
        yield from read_raw_records(path)
        return
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow; fix: pip install 'parrot_sys[parquet]'") from None
    with errors_named(path, DataError), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16):  # rows may hold pictures
            yield from batch.to_pylist()


def load_json(path: Path) -> Any:
    """
    Raises:
        DataError: the file is missing or no JSON.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON: {error}") from None


def rows_below(path: Path, key: str) -> list[Any]:
    """The list below `key` of a JSON object."""
    values = load_json(path)
    if not isinstance(values, Mapping) or not isinstance(values.get(key), list):
        raise DataError(f"{path} must hold a JSON object with a list {key!r}, got {kind_of(values)}")
    return list(values[key])


def lack(error: Exception) -> str:
    """Lack of a row, for messages."""
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def kind_of(values: Any) -> str:
    """A JSON value in words."""
    return f"an object with {sorted(values)[:5]}" if isinstance(values, Mapping) else type(values).__name__


def ask(text: str, *, image: bool = False, about: str = "") -> dict[str, str]:
    """Turn of a user."""
    turn = {"from": "human", "value": f"{IMAGE_TOKEN}\n{text}" if image else text}
    return turn | ({"input": about} if about else {})


def reply(text: str) -> dict[str, str]:
    """Turn of the model."""
    return {"from": "gpt", "value": text}


def text_of(row: Row, name: str, *, empty: bool = False) -> str:
    """A string field, stripped.

    Raises:
        DataError: no string there, or (unless `empty`) nothing in it.
    """
    value = row[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f"`{name}` must be a text{'' if empty else ' that is not empty'}, got {value!r}")
    return value.strip()


def texts_of(row: Row, name: str) -> list[str]:
    """A field with one or more strings, stripped.

    Raises:
        DataError: no list of strings there, or an empty one or one with nothing in it.
    """
    values = row[name]
    if not isinstance(values, list) or not values:
        raise DataError(f"`{name}` must be a list of texts, got {values!r}")
    return [text_of({name: value}, name) for value in values]


def options_of(row: Row) -> list[str]:
    """The field `options`: a list of texts, or one that stands as a Python list in a text.

    Raises:
        DataError: it is neither.
    """
    options = row["options"]
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options.replace("\n", " "))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"`options` must be a list of texts, got {row['options']!r}") from None
    return texts_of({"options": options}, "options")


def place_of(value: Any, name: str, count: int) -> int:
    """A field with the place of the right one of `count` options.

    Raises:
        DataError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(f"`{name}` must be in [0, {count}), got {value!r}")
    return value


def embedded(value: Any) -> bytes | None:
    """Bytes of a picture that a row holds: Hugging Face's struct, bytes, or base64; None where it holds none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, str) and value not in ("", "None"):
        try:
            return decode_base64(value)
        except ValueError as error:
            raise DataError(f"holds a picture that is no base64: {error}") from None
    return value if isinstance(value, bytes) and value else None
