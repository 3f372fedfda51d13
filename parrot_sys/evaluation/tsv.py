"""Multiple-choice tables as the public kit keeps them: one TSV per language, images in base64 inside.

Columns: `index`, `question`, option columns (any single capital letter; an empty cell means that the option does not
exist), `answer`, `image` (base64, or the `index` of the row that holds it), and where present `hint`, `category`,
`l2-category`, `split`, `g_index`, and `history`: a JSON list of the turns before the question, `[question, answer]`
each. Only in a table with that column may a row have no picture (an empty `image`): it is about text alone. A table
without `answer`, or with that column empty, is for predictions only. Case and `-`/`_` in column names do not matter.
Read as VLMEvalKit reads them (vlmeval/dataset/image_base.py), except that no row is lost and an option such as `None`
or `NA` is kept, see `cells` and `grid`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.image_files import EncodedImage
from parrot_sys.data.image_sources.data_urls import decode_base64
from parrot_sys.data.languages import file_suffix, split_suffix
from parrot_sys.errors import DataError
from parrot_sys.evaluation.grid import Grid, present, read_grid, whole_number

_REFERENCE_LENGTH = 64
"""An image cell of at most this many characters is the index of another row (VLMEvalKit's rule)."""
_ROTATION = 1_000_000
"""Rows whose index agrees modulo this are one question with its options rotated (MMBench's circular evaluation)."""
_KIT_NAMES = {"mmmb": "MMMB", "mmbench_dev": "MMBench_dev", "mmbench": "MMBench_dev"}
_GENERIC_SPLITS = {"", "dev", "val", "test", "train"}
_NAMED = 20
"""Bad questions that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row of a table."""

    index: int
    question: str
    options: Mapping[str, str]
    """Letter -> text, in alphabetical order, of the options that exist."""
    answer: str
    """The right letter; empty in a table without answers."""
    image_key: str | None
    """Key of the picture in `QuestionSet.images`; rows that share a picture share the key; None: no picture."""
    group: int
    """The question that this row is a rotation of (`g_index`, or index modulo 1,000,000)."""
    row: int = 0
    """Row of the file, of which the column names are the first."""
    problem: str = ""
    """Why it cannot be asked; empty where it can."""
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
    """Name that the languages of one benchmark have in common: the file's name without its language (`mmmb`)."""
    language: str
    questions: tuple[Question, ...]
    images: Mapping[str, str] = field(repr=False)
    """Key -> base64."""
    digest: str
    """SHA-256 of the file."""
    has_answers: bool = True
    """False: there is nothing to score, predictions only."""
    kit_unseen: frozenset[int] = frozenset()
    """Indices of rows with a text such as `None` or `NA`, which is empty to the public kit."""

    def image(self, key: str) -> EncodedImage:
        """The picture as the bytes of an image file, for `ParrotProcessor.images` or `load_image`.

        Raises:
            DataError: where the cell is no base64.
        """
        indices = ", ".join(str(q.index) for q in self.questions if q.image_key == key)
        try:
            data = picture_bytes(self.images[key])
        except ValueError as error:
            raise DataError(
                f"image of index {indices} of {self.path} cannot be decoded: {error}; the cell must be base64"
            ) from error
        return EncodedImage(data, f"of index {indices} of {self.path}")

    def place(self, question: Question) -> str:
        """The place of a question, for messages."""
        return f"{self.path}, row {question.row}, index {question.index}"

    @property
    def problems(self) -> list[str]:
        """Questions that cannot be asked, and why."""
        return [f"{self.place(q)}: {q.problem}" for q in self.questions if q.problem]

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


def picture_bytes(cell: str) -> bytes:
    """Content of a picture's cell: base64, also over several lines or as a data URL.

    Raises:
        ValueError: it is neither.
    """
    text = cell.strip()
    if text.startswith("["):
        raise ValueError("it holds a list of pictures, and a question takes one")
    return decode_base64(text)


def read_table(path: str | Path, *, keep_bad: bool = False) -> QuestionSet:
    """Reads and checks one TSV.

    Args:
        path: the file.
        keep_bad: keep questions that cannot be asked, with their `problem`, instead of ending with an error.

    Raises:
        DataError: naming file, row and reason: a missing column, a double index; unless `keep_bad`, an answer that is
            no option, an image that is missing or refers to nothing, and the like.
    """
    path = Path(path)
    grid = read_grid(path)
    if not grid.rows:
        raise DataError(f"{path} has no rows")
    if not grid.options:
        raise DataError(f"{path} has no option column (A, B, ...), got {', '.join(grid.written)}")
    has_answers = any(present(row.get("answer", "")) for row in grid.rows)
    indices = _indices(grid, path)
    cells = {index: row["image"].strip() for index, row in zip(indices, grid.rows, strict=True)}
    questions = []
    for number, (index, row) in enumerate(zip(indices, grid.rows, strict=True), 2):
        question = replace(_read_row(index, row, grid, has_answers=has_answers), row=number)
        if number in grid.damaged:
            question = replace(question, problem=_joined("the row holds bytes that are no UTF-8", question.problem))
        questions.append(_with_picture(question, cells, optional="history" in grid.columns))
    base, stated = split_suffix(path.stem.lower())
    language = stated or "en"  # as in the wrapper
    table = QuestionSet(
        path=path,
        name=f"{_KIT_NAMES[base]}_{file_suffix(language)}" if base in _KIT_NAMES else path.stem,
        suite=base,
        language=language,
        questions=tuple(questions),
        images={q.image_key: cells[int(q.image_key)] for q in questions if q.image_key is not None},
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        has_answers=has_answers,
        kit_unseen=frozenset(index for index, names in zip(indices, grid.unseen, strict=True) if names),
    )
    assert len(table.questions) == len(grid.rows), "every row is a question"
    if not keep_bad:
        refuse(table.problems)
    return table


def refuse(problems: Sequence[str], advice: str = "") -> None:
    """Ends with an error that names questions which cannot be asked.

    Args:
        problems: of each its place and the reason.
        advice: what else can be done, for the end of the message.

    Raises:
        DataError: there are any.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(problems[0] + advice)
    lines = ["questions that cannot be asked:", *problems[:_NAMED]]
    files = ", ".join(dict.fromkeys(problem.split(", row ")[0] for problem in problems))
    raise DataError("\n  ".join(lines) + f"\n{len(problems)} questions of {files} cannot be asked{advice}")


def _indices(grid: Grid, path: Path) -> list[int]:
    """Index of every row: a whole number that no other row has."""
    indices: dict[int, None] = {}
    problems = []
    for number, row in enumerate(grid.rows, 2):
        index = whole_number(row["index"])
        if index is None:
            problems.append(f"{path}, row {number}: index must be a whole number, got {row['index'][:80]!r}")
        elif index in indices:
            problems.append(f"{path}, row {number}: index {index} occurs twice; every row needs its own")
        else:
            indices[index] = None
    refuse(problems)
    return list(indices)


def _read_row(index: int, row: Mapping[str, str], grid: Grid, *, has_answers: bool) -> Question:
    """Everything of a row but its picture."""
    options = {letter: row[letter] for letter in grid.options if present(row[letter])}
    answer = row.get("answer", "").strip() if has_answers else ""
    cell = row.get("g_index", "")
    group = whole_number(cell) if present(cell) else index % _ROTATION
    problems = []
    history: tuple[tuple[str, str], ...] = ()
    try:
        history = _read_history(row.get("history", ""))
    except DataError as error:
        problems.append(str(error))
    if not options:
        problems.append(f"no option column has text; wanted at least one of {', '.join(grid.options)}")
    elif has_answers and answer not in options:
        problems.append(f"answer must be one of the options {', '.join(options)}, got {answer!r}")
    if not present(row["question"]):
        problems.append("the question is empty")
    if group is None:
        problems.append(f"g_index must be a whole number, got {cell[:80]!r}")
    return Question(
        index=index,
        question=row["question"],
        options=options,
        answer=answer,
        image_key=None,
        history=history,
        group=index if group is None else group,
        hint=row["hint"] if present(row.get("hint", "")) else None,
        category=_text(row.get("category", "")),
        l2_category=_text(row.get("l2-category", "")),
        split=_text(row.get("split", "")),
        problem=_joined(*problems),
    )


def _read_history(cell: str) -> tuple[tuple[str, str], ...]:
    if not present(cell):
        return ()
    try:
        turns = json.loads(cell)
    except ValueError as error:
        raise DataError(f"history is no JSON ({error})") from error
    texts = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text for text in turn)
        for turn in turns
    )
    if not texts or IMAGE_TOKEN in cell:
        raise DataError(
            f"history must be a list of earlier turns [question, answer] without {IMAGE_TOKEN} (the picture "
            f"belongs to the last turn), got {cell[:120]}"
        )
    return tuple((question, answer) for question, answer in turns)


def _text(cell: str) -> str:
    return cell.strip() if present(cell) else ""


def _with_picture(question: Question, cells: Mapping[int, str], *, optional: bool) -> Question:
    """The question with the index of the row that holds its picture, or with the problem that there is none.

    Args:
        question: the row.
        cells: index -> cell of every row.
        optional: whether a row may do without a picture.
    """
    cell = cells[question.index]
    target = question.index if len(cell) > _REFERENCE_LENGTH else whole_number(cell)
    if not present(cell):
        problem = "" if optional else "no image; wanted base64, or the index of the row that holds it"
    elif target is None or target not in cells:
        problem = f"the image refers to row {cell!r}, which does not exist"
    elif len(cells[target]) <= _REFERENCE_LENGTH:
        problem = f"the image refers to row {target}, which holds no image itself"
    else:
        return replace(question, image_key=str(target))
    return replace(question, problem=_joined(question.problem, problem))


def _joined(*problems: str) -> str:
    return "; ".join(filter(None, problems))


def iter_groups(questions: Sequence[Question]) -> Iterator[tuple[int, list[int]]]:
    """(group, positions of its rows in `questions`), in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for position, question in enumerate(questions):
        groups.setdefault(question.group, []).append(position)
    yield from groups.items()
