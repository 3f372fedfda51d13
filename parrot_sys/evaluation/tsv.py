"""Multiple-choice tables as the public kit keeps them: one TSV per language, images in base64 inside.

Columns: `index`, `question`, option columns (any single capital letter; an empty cell means that the option does not
exist), `answer`, `image` (base64, or the `index` of the row that holds it), and where present `hint`, `category`,
`l2-category`, `split`, `g_index`, and `history`: a JSON list of the turns before the question, `[question, answer]`
each. Only in a table with that column may a row have no picture (an empty `image`): it is about text alone. Case and
`-`/`_` in column names do not matter. Read as VLMEvalKit reads them (vlmeval/dataset/image_base.py), except that every
cell stays text, so that an option such as `None`, `NA` or `1.50` is kept as it is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from parrot_sys.data.constants import IMAGE_TOKEN, LANGUAGES
from parrot_sys.data.decoding import EncodedImage
from parrot_sys.errors import DataError

_REFERENCE_LENGTH = 64
"""An image cell of at most this many characters is the index of another row (VLMEvalKit's rule)."""
_ROTATION = 1_000_000
"""Rows whose index agrees modulo this are one question with its options rotated (MMBench's circular evaluation)."""
_LANGUAGE_OF_SUFFIX = {"cn": "zh", **{language: language for language in LANGUAGES}}
_SUFFIX_OF_LANGUAGE = {"zh": "cn"}
_KIT_NAMES = {"mmmb": "MMMB", "mmbench_dev": "MMBench_dev", "mmbench": "MMBench_dev"}
_GENERIC_SPLITS = {"", "dev", "val", "test", "train"}
_REQUIRED = ("index", "question", "answer", "image")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row of a table."""

    index: int
    question: str
    options: Mapping[str, str]
    """Letter -> text, in alphabetical order, of the options that exist."""
    answer: str
    """The right letter."""
    image_key: str | None
    """Key of the picture in `QuestionSet.images`; rows that share a picture share the key; None: no picture."""
    group: int
    """The question that this row is a rotation of (`g_index`, or index modulo 1,000,000)."""
    history: tuple[tuple[str, str], ...] = ()
    """Question and answer of each earlier turn; none of them has a picture."""
    hint: str | None = None
    category: str = ""
    l2_category: str = ""
    split: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionSet:
    """One table: the questions of one benchmark in one language."""

    path: Path
    name: str
    """Name of the data set as the public kit spells it (`MMMB_en`), else the file's stem."""
    suite: str
    """What the languages of one benchmark have in common: the file's name without its language (`mmmb`)."""
    language: str
    questions: tuple[Question, ...]
    images: Mapping[str, str] = field(repr=False)
    """Key -> base64."""
    digest: str
    """SHA-256 of the file."""

    def image(self, key: str) -> EncodedImage:
        """The picture as the bytes of an image file, for `ParrotProcessor.images` or `load_image`.

        Raises:
            DataError: where the cell is no base64.
        """
        rows = ", ".join(str(q.index) for q in self.questions if q.image_key == key)
        try:
            data = base64.b64decode(self.images[key], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(
                f"image of row {rows} of {self.path} cannot be decoded: {error}; the cell must be base64"
            ) from error
        return EncodedImage(data, f"of row {rows} of {self.path}")

    def parts(self) -> dict[str, list[Question]]:
        """Name -> questions of what is reported on its own: each value of `split`, or the whole suite where splits say
        nothing (`dev`, `test`, ...)."""
        parts: dict[str, list[Question]] = {}
        for question in self.questions:
            name = self.suite if question.split in _GENERIC_SPLITS else question.split
            parts.setdefault(name, []).append(question)
        return parts

    def limited(self, questions: int) -> QuestionSet:
        """So many questions of each part with all their rotations, spread evenly over it."""
        kept: set[int] = set()
        for part in self.parts().values():
            groups = list(dict.fromkeys(question.group for question in part))
            wanted = min(questions, len(groups))
            kept.update(groups[i * len(groups) // wanted] for i in range(wanted))
        return replace(self, questions=tuple(q for q in self.questions if q.group in kept))


def find_tables(paths: Sequence[str | Path]) -> list[Path]:
    """TSV files among `paths`: a file stands for itself, a folder for every TSV below it.

    Raises:
        DataError: for a missing path or a folder without tables.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(path.rglob("*.tsv"))
            if not below:
                raise DataError(f"{path} holds no .tsv file; `parrot data build --output DIR` makes the default tables")
            found.update(dict.fromkeys(below))
        elif path.is_file():
            found[path] = None
        else:
            raise DataError(f"{path} does not exist; name a .tsv file or a folder that holds some")
    return list(found)


def language_of(name: str) -> str:
    """Language that a data set's name ends in (`mmmb_cn` -> `zh`); English where it names none, as in the wrapper."""
    return _LANGUAGE_OF_SUFFIX.get(name.lower().rsplit("_", 1)[-1], "en")


def read_table(path: str | Path) -> QuestionSet:
    """Reads and checks one TSV.

    Raises:
        DataError: naming file, row and reason: a missing column, a double index, an answer that is no option, an image
            that is missing or refers to nothing.
    """
    path = Path(path)
    frame = read_frame(path)
    if frame.empty:
        raise DataError(f"{path} has no rows")
    letters = sorted(column for column in frame.columns if re.fullmatch(r"[A-Z]", column))
    if not letters:
        raise DataError(f"{path} has no option column (A, B, ...), got {', '.join(frame.columns)}")
    questions, cells = [], {}
    for number, row in enumerate(frame.to_dict("records")):
        question = _read_row(row, letters, f"{path}, row {number + 2}")
        if question.index in cells:
            raise DataError(f"{path}, row {number + 2}: index {question.index} occurs twice; every row needs its own")
        cells[question.index] = str(row["image"]).strip()
        questions.append(question)
    dialogues = "history" in frame.columns
    keys = {
        index: None if dialogues and not _present(cells[index]) else _resolve(index, cells, path) for index in cells
    }
    stem = path.stem.lower()
    language = language_of(stem)
    base = stem.rsplit("_", 1)[0] if stem.rsplit("_", 1)[-1] in _LANGUAGE_OF_SUFFIX else stem
    return QuestionSet(
        path=path,
        name=f"{_KIT_NAMES[base]}_{_SUFFIX_OF_LANGUAGE.get(language, language)}" if base in _KIT_NAMES else path.stem,
        suite=base,
        language=language,
        questions=tuple(replace(q, image_key=_key(keys[q.index])) for q in questions),
        images={str(index): cells[index] for index in set(keys.values()) if index is not None},
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def read_frame(path: Path) -> pd.DataFrame:
    """The table as text, with the column names that this module uses.

    Raises:
        DataError: when the file is no TSV or lacks a column.
    """
    try:
        frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path} cannot be read as a tab-separated table: {error}") from error
    frame.columns = pd.Index([_column_name(str(name)) for name in frame.columns])
    double = [name for name in frame.columns.unique() if (frame.columns == name).sum() > 1]
    missing = [name for name in _REQUIRED if name not in frame.columns]
    if missing or double:
        problem = f"lacks the column {missing[0]!r}" if missing else f"has the column {double[0]!r} twice"
        raise DataError(
            f"{path} {problem}; wanted {', '.join(_REQUIRED)} and options A, B, ..., got {', '.join(frame.columns)}"
        )
    return frame


def _column_name(name: str) -> str:
    name = name.strip()
    if re.fullmatch(r"[A-Z]", name):
        return name
    name = name.lower().replace("_", "-")
    return {"g-index": "g_index"}.get(name, name)


def _read_row(row: Mapping[str, object], letters: Sequence[str], where: str) -> Question:
    index = _whole_number(row["index"], "index", where)
    options = {letter: str(row[letter]) for letter in letters if _present(row[letter])}
    answer = str(row["answer"]).strip()
    if not options:
        raise DataError(f"{where}: no option column has text; wanted at least one of {', '.join(letters)}")
    if answer not in options:
        raise DataError(f"{where}: answer must be one of the options {', '.join(options)}, got {answer!r}")
    if not _present(row["question"]):
        raise DataError(f"{where}: the question is empty")
    g_index = row.get("g_index", "")
    return Question(
        index=index,
        question=str(row["question"]),
        options=options,
        answer=answer,
        image_key=None,
        history=_read_history(row.get("history", ""), where),
        group=_whole_number(g_index, "g_index", where) if _present(g_index) else index % _ROTATION,
        hint=str(row["hint"]) if _present(row.get("hint", "")) else None,
        category=_text(row.get("category", "")),
        l2_category=_text(row.get("l2-category", "")),
        split=_text(row.get("split", "")),
    )


def _read_history(cell: object, where: str) -> tuple[tuple[str, str], ...]:
    if not _present(cell):
        return ()
    try:
        turns = json.loads(str(cell))
    except ValueError as error:
        raise DataError(f"{where}: history is no JSON ({error})") from error
    texts = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text for text in turn)
        for turn in turns
    )
    if not texts or IMAGE_TOKEN in str(cell):
        raise DataError(
            f"{where}: history must be a list of earlier turns [question, answer] without {IMAGE_TOKEN} (the picture "
            f"belongs to the last turn), got {str(cell)[:120]}"
        )
    return tuple((question, answer) for question, answer in turns)


def _key(index: int | None) -> str | None:
    return None if index is None else str(index)


def _present(cell: object) -> bool:
    return str(cell).strip() not in ("", "nan", "NaN")


def _text(cell: object) -> str:
    return str(cell).strip() if _present(cell) else ""


def _whole_number(cell: object, column: str, where: str) -> int:
    try:
        number = float(str(cell))  # a spreadsheet may have made 12 into 12.0
        if number.is_integer():
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise DataError(f"{where}: {column} must be a whole number, got {str(cell)!r}")


def _resolve(index: int, cells: Mapping[int, str], path: Path) -> int:
    """Index of the row that holds the picture of row `index`."""
    cell = cells[index]
    if not _present(cell):
        raise DataError(f"{path}, index {index}: no image; wanted base64, or the index of the row that holds it")
    if len(cell) > _REFERENCE_LENGTH:
        return index
    target = int(float(cell)) if re.fullmatch(r"\d+(\.0)?", cell) else None
    if target is None or target not in cells:
        raise DataError(f"{path}, index {index}: the image refers to row {cell!r}, which does not exist")
    if len(cells[target]) <= _REFERENCE_LENGTH:
        raise DataError(f"{path}, index {index}: the image refers to row {target}, which holds no image itself")
    return target


def iter_groups(questions: Sequence[Question]) -> Iterator[tuple[int, list[int]]]:
    """(group, positions of its rows in `questions`), in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for position, question in enumerate(questions):
        groups.setdefault(question.group, []).append(position)
    yield from groups.items()
