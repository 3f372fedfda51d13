"""Questions of a public set as tables in MMMB's format, one a language, the pictures inside."""

from __future__ import annotations

import base64
import csv
import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import Question
from parrot_sys.data.languages import file_suffix, in_order
from parrot_sys.errors import DataError

MOST_OPTIONS = len(string.ascii_uppercase)


@dataclass(frozen=True, slots=True)
class TableRow:
    """A question for a table."""

    question: Question
    language: str
    picture: bytes | None


def check_question(question: Question) -> None:
    """
    Raises:
        DataError: a table cannot hold the question.
    """
    if not question.options:
        raise DataError("is an open question, and a table takes multiple choice: write records (.json)")
    if len(question.options) > MOST_OPTIONS:
        raise DataError(f"has {len(question.options)} options, and a table takes {MOST_OPTIONS}")
    if len(question.pictures) > 1:
        raise DataError(f"has {len(question.pictures)} pictures, and a question of a table takes one")
    if any(IMAGE_TOKEN in option for option in question.options):
        raise DataError("has a picture in an option, and a table takes one beside the question")


def table_path(output: Path, language: str) -> Path:
    """The file of a language: `cvqa.tsv` becomes `cvqa_pt-BR.tsv`."""
    return output.with_name(f"{output.stem}_{file_suffix(language)}.tsv")


def by_language(rows: Sequence[TableRow]) -> dict[str, list[TableRow]]:
    """Language -> its rows."""
    return {code: [row for row in rows if row.language == code] for code in in_order(row.language for row in rows)}


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Writes one table; it appears when it is whole.

    A picture is stored once, and rows that share it name its row. Columns that would be empty are left out, but for
    `history`, which a table needs where a row has no picture.
    """
    letters = string.ascii_uppercase[: max(len(row.question.options) for row in rows)]
    texts = [_cells(row.question, letters) for row in rows]
    columns = [name for name in texts[0] if name in ("question", *letters) or any(cells[name] for cells in texts)]
    if any(row.picture is None for row in rows):
        columns.append("history")
    held: dict[str, int] = {}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["index", *columns, "image"])
            for index, (row, cells) in enumerate(zip(rows, texts, strict=True)):
                writer.writerow([index, *(cells.get(name, "") for name in columns), _image(row.picture, index, held)])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _cells(question: Question, letters: str) -> Mapping[str, str]:
    answer = question.answer
    options = dict.fromkeys(letters, "") | dict(zip(letters, question.options, strict=False))
    return {
        "hint": _plain(question.hint),
        "question": _plain(question.question),
        **options,
        "answer": letters[answer] if isinstance(answer, int) else "",
        "category": question.category,
        "l2-category": question.l2_category,
        "id": question.record_id,
    }


def _plain(text: str) -> str:
    """A text without markers: the picture of a table stands before the question."""
    return text.replace(IMAGE_TOKEN, "").strip()


def _image(picture: bytes | None, index: int, held: dict[str, int]) -> str:
    """Base64, or the index of the row that holds the same picture already."""
    if picture is None:
        return ""
    first = held.setdefault(hashlib.sha256(picture).hexdigest(), index)
    return base64.b64encode(picture).decode() if first == index else str(first)
