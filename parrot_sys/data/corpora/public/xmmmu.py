"""xMMMU of PangeaBench (Yue et al. 2024): MMMU's questions in seven languages; its multiple-choice part.

Parquet files, one a language, which the rows do not name: `--language`. Options are a Python list as text; `<image 1>`
in a text stands for the picture in the column `image_1`. Open questions are passed over.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import Question, Row, Source, embedded, options_of, read_rows, text_of
from parrot_sys.errors import DataError

_MARKER = re.compile(r"<image (\d+)>")


def _read(path: Path) -> Iterator[Any]:
    for row in read_rows(path):
        if not isinstance(row, Mapping) or row.get("question_type", "multiple-choice") == "multiple-choice":
            yield row


def _convert(row: Row, _: random.Random) -> Question:
    options = options_of(row)
    letters, letter = string.ascii_uppercase[: len(options)], text_of(row, "answer")
    if len(letter) != 1 or letter not in letters:
        raise DataError(f"`answer` must be one of {', '.join(letters)}, got {letter!r}")
    question = text_of(row, "question")
    pictures = []
    for number in _MARKER.findall("\n".join([question, *options])):
        if (picture := embedded(row.get(f"image_{number}"))) is None:
            raise DataError(f"holds no picture image_{number}")
        pictures.append(picture)
    name = str(row.get("id", ""))
    subject = re.fullmatch(r"[^_]*_(.+)_\d+", name)
    return Question(
        question=_MARKER.sub(IMAGE_TOKEN, question),
        options=[_MARKER.sub(IMAGE_TOKEN, option) for option in options],
        answer=letters.index(letter),
        pictures=pictures,
        category=subject[1] if subject else "",
        record_id=name,
    )


XMMMU = Source(
    read=_read,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"id", "question", "options", "answer", "question_type", "image_1", ...}',
)
