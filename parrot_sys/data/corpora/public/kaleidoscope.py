"""Kaleidoscope (Salazar et al. 2025): exams in 18 languages, with and without pictures.

Rows of the Hub's `CohereLabs/kaleidoscope`, as Parquet or JSON lines; `image` is a name in its `data.zip`, below
`final_data/`. Questions whose options are pictures are refused, as the authors leave them out.
"""

from __future__ import annotations

import random
from pathlib import PurePosixPath

from parrot_sys.data.corpora.public.base import (
    Question,
    Row,
    Source,
    embedded,
    options_of,
    place_of,
    read_rows,
    text_of,
)
from parrot_sys.errors import DataError

_PICTURES = (".png", ".jpg", ".jpeg")


def _convert(row: Row, _: random.Random) -> Question:
    options = options_of(row)
    if any(option.lower().endswith(_PICTURES) for option in options):
        raise DataError("its options are pictures")
    image, inside = row.get("image"), embedded(row.get("image") if not isinstance(row.get("image"), str) else None)
    names = []
    if isinstance(image, str) and image not in ("", "None"):
        plain = image.replace("\\", "/").removeprefix("./")
        names = [plain, f"final_data/{plain}", PurePosixPath(plain).name]
    return Question(
        question=text_of(row, "question"),
        options=options,
        answer=place_of(row["answer"], "answer", len(options)),
        pictures=[inside] if inside is not None else [names] if names else [],
        language=text_of(row, "language"),
        category=str(row.get("category_en") or ""),
        l2_category=str(row.get("general_category_en") or ""),
    )


KALEIDOSCOPE = Source(
    read=read_rows,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"language", "question", "options", "answer", "image", "category_en", ...}',
)
