"""CVQA (Romero et al. 2024): multiple choice about pictures of 30 countries in 31 languages.

Parquet files of the Hub's `afaji/cvqa`, which PangeaBench uses as they are: the language is in the subset, such as
`('Japanese', 'Japan')`. The public test split keeps its answers secret (`Label` is absent, null or -1).
"""

from __future__ import annotations

import ast
import random
from typing import Any

from parrot_sys.data.corpora.public.base import Question, Row, Source, embedded, place_of, read_rows, text_of, texts_of
from parrot_sys.data.languages import code_of_name
from parrot_sys.errors import DataError


def _convert(row: Row, _: random.Random) -> Question:
    options, label, picture = texts_of(row, "Options"), row.get("Label"), embedded(row["image"])
    if picture is None:
        raise DataError("holds no picture")
    language, country = _subset(row["Subset"])
    return Question(
        question=text_of(row, "Question"),
        options=options,
        answer=None if label in (None, -1) else place_of(label, "Label", len(options)),
        pictures=[picture],
        language=language,
        category=str(row.get("Category") or ""),
        l2_category=country,
        record_id=str(row["ID"]),
    )


def _subset(value: Any) -> tuple[str, str]:
    """(code of the language, country) of a subset."""
    try:
        language, country = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError):
        raise DataError(f"`Subset` must be a language and a country, got {value!r}") from None
    code = code_of_name(str(language))
    if code is None:
        raise DataError(f"`Subset` names the language {language!r}, which has no code here")
    return code, str(country)


CVQA = Source(
    read=read_rows,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"ID", "Subset", "Question", "Options", "Label", "Category", "image"}',
)
