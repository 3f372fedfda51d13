"""M3Exam (Zhang et al. 2023): school exams in nine languages, with and without pictures.

The published files are `LANGUAGE-questions-image.json` (pictures in `images-LANGUAGE/`) and, without pictures,
`LANGUAGE-questions-test.json`. There are Parquet files with the pictures inside, whose names are in `image_ids`: those
of PangeaBench have the columns `image_0`, `image_1`, ..., and floschne/multimodal-m3exam, which lmms-eval reads, has
the list `images`. A text marks a picture as `(image)[NAME]`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import Picture, Question, Row, Source, embedded, read_rows, text_of, texts_of
from parrot_sys.data.languages import code_of_name
from parrot_sys.errors import DataError

_MARKER = re.compile(r"\(image\)\[([^\]]+)\]")
_LABELLED = re.compile(r"[(\uff08]?\s*([^\W_])\s*[)\uff09.\uff0e:\uff1a\u3001]\s*", re.UNICODE)
_BARE = re.compile(r"[(\uff08]?\s*([^\W_])(?:\s*[)\uff09.\uff0e:\uff1a\u3001]\s*|\s+)", re.UNICODE)
_IMAGES_IN_A_ROW = 10


def _convert(row: Row, _: random.Random) -> Question:
    language = text_of(row, "language")
    code = code_of_name(language)
    if code is None:
        raise DataError(f"`language` is {language!r}, which has no code here")
    labels, options = _options(texts_of(row, "options"))
    background = row.get("background_description") or []
    hint = "\n".join(background) if isinstance(background, list) else str(background)
    question = text_of(row, "question_text")
    names = _MARKER.findall("\n".join([hint, question, *options]))
    inside = _inside(row)
    return Question(
        question=_MARKER.sub(IMAGE_TOKEN, question),
        options=[_MARKER.sub(IMAGE_TOKEN, option) for option in options],
        answer=_answer(text_of(row, "answer_text"), labels),
        pictures=[_picture(name, inside, language) for name in names],
        language=code,
        hint=_MARKER.sub(IMAGE_TOKEN, hint.strip()),
        category=str(row.get("subject_category") or ""),
        l2_category=str(row.get("level") or ""),
    )


def _options(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels of the options as the exam has them, and the options without; 1, 2, ... where they have none."""
    found = _without_labels(texts, _LABELLED)
    # (Labels with a space alone: not of "1 hour", "2 hours", "3 hours", whose numbers tell them apart.)
    if found is None and len(texts) > 1:
        found = _without_labels(texts, _BARE)
        if found is not None and len({rest.casefold() for rest in found[1]} - {""}) != len(texts):
            found = None
    return found or ([str(number) for number in range(1, len(texts) + 1)], list(texts))


def _without_labels(texts: Sequence[str], label: re.Pattern[str]) -> tuple[list[str], list[str]] | None:
    """Labels and the rest of the texts; None unless all have one, from A or 1 on: "5. Dezember" has none."""
    matches = [label.match(text) for text in texts]
    labels = [match[1].upper() if match else "" for match in matches]
    if labels[0] not in ("A", "1") or labels != [chr(ord(labels[0]) + place) for place in range(len(texts))]:
        return None
    return labels, [text[match.end() :] for text, match in zip(texts, matches, strict=True) if match]


def _answer(text: str, labels: Sequence[str]) -> int:
    """Place of the option that the answer names, by its label, or by A, B, ... or 1, 2, ... in their order."""
    label = text.strip("()\uff08\uff09. ").upper()
    count = len(labels)
    for names in (labels, [str(number) for number in range(1, count + 1)], [chr(ord("A") + i) for i in range(count)]):
        if label in names:
            return list(names).index(label)
    raise DataError(f"`answer_text` must name one of the options {', '.join(labels)}, got {text!r}")


def _inside(row: Row) -> dict[str, bytes]:
    """Name -> picture that the row holds itself."""
    names = [str(name) for name in row.get("image_ids") or ()]
    values = row.get("images")
    if values is None:
        values = [row.get(f"image_{place}") for place in range(min(len(names), _IMAGES_IN_A_ROW))]
    elif len(values) != len(names):
        raise DataError(f"`images` must have one picture for each of the {len(names)} `image_ids`, got {len(values)}")
    pictures = zip(names, map(embedded, values), strict=False)
    return {name: picture for name, picture in pictures if picture is not None}


def _picture(name: str, inside: dict[str, bytes], language: str) -> Picture:
    return inside.get(name, [name, f"images-{language}/{name}"])


M3EXAM = Source(
    read=read_rows,
    convert=_convert,
    has_images=True,
    images_inside=True,
    language=None,
    wanted='{"question_text", "background_description", "options", "answer_text", "language", ...}',
)
