"""MaXM (Changpinyo et al. 2022): open questions in seven languages about pictures of Crossmodal-3600.

`maxm_v1_LANGUAGE.json` has questions by picture; PangeaBench has Parquet files with the pictures inside. Several
answers are right; the first one becomes the answer of a record.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parrot_sys.data.corpora.public.base import (
    Question,
    Row,
    Source,
    embedded,
    lack,
    load_json,
    read_rows,
    rows_below,
    text_of,
    texts_of,
)
from parrot_sys.errors import DataError


def _read(path: Path) -> Iterator[Any]:
    if path.suffix.lower() != ".json":
        yield from read_rows(path)
        return
    pictures, language = rows_below(path, "annotations"), load_json(path).get("split", "")
    for index, picture in enumerate(pictures):
        try:
            pairs = [{**pair, "image_id": picture["image_id"], "language": language} for pair in picture["qa_pairs"]]
        except (KeyError, TypeError) as error:
            yield DataError(f"picture {index} of the file is none of MaXM's: {lack(error)}")
            continue
        yield from pairs


def _convert(row: Row, _: random.Random) -> Question:
    inside = embedded(row.get("image"))
    name = str(row["image_id"]) if inside is None else ""
    language = row.get("language", "")
    return Question(
        question=text_of(row, "question"),
        answer=texts_of(row, "answers")[0],
        pictures=[[f"{name}.jpg", f"images/{name}.jpg"] if inside is None else inside],
        language=language if isinstance(language, str) else "",
        category="collection" if _is_true(row.get("is_collection")) else "",
        record_id=str(row.get("question_id", "")),
    )


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() == "true"


MAXM = Source(
    read=_read,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"split", "annotations": [{"image_id", "qa_pairs": [{"question_id", "question", "answers"}]}]}',
)
