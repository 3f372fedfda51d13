"""xGQA (Pfeiffer et al. 2021): GQA's questions in eight languages; answers are GQA's, in English.

The repository has `testdev_balanced_questions_LANGUAGE.json` and `few_shot/LANGUAGE/*.json`: an object of questions by
their ids. PangeaBench has Parquet files with the pictures inside.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parrot_sys.data.corpora.public.base import Question, Row, Source, embedded, kind_of, load_json, read_rows, text_of
from parrot_sys.errors import DataError


def _read(path: Path) -> Iterator[Any]:
    if path.suffix.lower() != ".json":
        yield from read_rows(path)
        return
    questions = load_json(path)
    if not isinstance(questions, Mapping):
        raise DataError(f"{path} must hold a JSON object of questions by their ids, got {kind_of(questions)}")
    for name, question in questions.items():
        yield {"question_id": name, **question} if isinstance(question, Mapping) else question


def _convert(row: Row, _: random.Random) -> Question:
    inside = embedded(row.get("image"))
    name = "" if inside is not None else str(row["imageId"])
    return Question(
        question=text_of(row, "question"),
        answer=text_of(row, "answer"),
        pictures=[[f"{name}.jpg", f"images/{name}.jpg"] if inside is None else inside],
        record_id=str(row.get("question_id", "")),
    )


XGQA = Source(
    read=_read,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{ID: {"question", "imageId", "answer"}}, or rows with "image" in Parquet',
)
