"""MaRVL of PangeaBench (Liu et al. 2021; Yue et al. 2024): is a statement about a picture true or false?

Parquet files, one a language, which the rows do not name: `--language`. A row is a conversation in LLaVA's form, whose
answer is true or false; these words become the options of a question.
"""

from __future__ import annotations

import random

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import Question, Row, Source, embedded, read_rows, text_of
from parrot_sys.errors import DataError

_OPTIONS = ("True", "False")
"""In the form in which the public kit reads a column of such words."""


def _convert(row: Row, _: random.Random) -> Question:
    statement, said = (text_of(turn, "value") for turn in row["conversations"])
    answers = [option for option in _OPTIONS if option.lower() in said.lower()]
    if len(answers) != 1:
        raise DataError(f"its answer must be true or false, got {said!r}")
    picture = embedded(row["image"])
    if picture is None:
        raise DataError("holds no picture")
    return Question(
        question=statement.replace(IMAGE_TOKEN, "").strip(),
        options=_OPTIONS,
        answer=_OPTIONS.index(answers[0]),
        pictures=[picture],
        record_id=str(row.get("id", "")),
    )


MARVL = Source(
    read=read_rows,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"id", "image", "conversations": [{"value": STATEMENT}, {"value": "true" or "false"}]}',
)
