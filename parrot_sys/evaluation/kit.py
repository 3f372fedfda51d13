"""Reading of a table by the public kit (VLMEvalKit), and the prediction files that it scores.

The kit reads tables and predictions with pandas' defaults (vlmeval/smp/file.py): a column of numbers becomes numbers,
so that the options `1`, `2` and a gap are shown as `1.0` and `2.0`, and cells such as `None` or `NA` are empty.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from parrot_sys.evaluation.grid import Grid, kit_column, read_grid, whole_number
from parrot_sys.evaluation.tsv import QuestionSet

_CIRCULAR_NAMES = ("mmbench", "ccbench", "circular", "mmcr")
_PUBLISHED_MD5 = {
    "MMMB_ar": "f3a18b6385f1d9701840aa42de27aead",
    "MMMB_cn": "13ed82fa89730037292fcaa27f08f430",
    "MMMB_en": "1cd781a71ec5a2983c090b84105d6a01",
    "MMMB_pt": "548ea2b3bb2da991790386f0015d30d1",
    "MMMB_ru": "ce1cc8a0533425ab0d86b326ebfc2984",
    "MMMB_tr": "0733739d43090327975294292bc5cd67",
    "MMBench_dev_ar": "4271b4a0d0200e1a86380a878e0d64a4",
    "MMBench_dev_cn": "2ed5135326fed02c8e51ea50dda8222f",
    "MMBench_dev_en": "d9ab776fc018b3d45785e9a5c23431c2",
    "MMBench_dev_pt": "4ddfbcd27ef12444b908c03831cd0295",
    "MMBench_dev_ru": "5ba1171ff2e68f80637bf78349e402a5",
    "MMBench_dev_tr": "4fab39d501389d3d6cc90264bb708f11",
}
"""The kit downloads these tables and knows them by their MD5 (vlmeval/dataset/image_mcq.py)."""
_GROUPING = ("split", "category", "l2-category")
"""Columns that the kit reports by; it cannot sort a column in which some cells are empty."""
_NO_VALUE = "none"
"""The kit's own name for rows of a table without splits."""
_LONGEST_CELL = 32_767
"""Characters that a cell of a spreadsheet holds."""
_EXACT_IN_FLOAT = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class KitFiles:
    """Files written for the public kit."""

    offered: Path | None
    """The spreadsheet that the kit scores, or that is handed in where the table has no answers; None: it refuses it."""
    refusals: tuple[str, ...]
    """Why the kit would refuse it."""
    namesake: bool
    """Whether the kit downloads another table of this name and would score the predictions against that one."""
    notes: tuple[str, ...]
    """Sentences for the report."""

    def entries(self, output: Path) -> dict[str, Any]:
        """`kit_file` (relative to `output`, or None), `kit_refusals` and `kit_namesake` for a score file."""
        return {
            "kit_file": None if self.offered is None else str(self.offered.relative_to(output)),
            "kit_refusals": list(self.refusals),
            "kit_namesake": self.namesake,
        }


def is_circular(dataset: str) -> bool:
    """Whether the kit reports circular accuracy for a data set of this name."""
    return any(name in dataset.lower() for name in _CIRCULAR_NAMES)


def write_kit_files(table: QuestionSet, predictions: Mapping[int, str], stem: Path) -> KitFiles:
    """Writes `stem`.tsv and, unless the kit refuses the table, `stem`.xlsx: the columns without pictures, and
    `prediction`.

    The public kit scores a file named `{model}_{dataset}.xlsx` (VLMEvalKit, vlmeval/inference.py). Rows without a
    prediction (a run limited to some questions) are left out.
    """
    grid = read_grid(table.path)
    rows: list[dict[str, Any]] = []
    for row in grid.rows:
        index = whole_number(row["index"])
        if index is not None and index in predictions:
            rows.append({**row, "index": index, "prediction": predictions[index]})
    columns = [name for name in grid.columns if name != "image"]
    for name in _GROUPING:
        if name in columns and not _fill(rows, name):
            columns.remove(name)
    frame = pd.DataFrame(rows, columns=[*columns, "prediction"], dtype=object)
    if "g_index" in frame:
        groups = {question.index: question.group for question in table.questions}
        frame["g_index"] = [groups[index] for index in frame["index"]]
    frame = frame.replace("", pd.NA)
    frame.to_csv(stem.parent / f"{stem.name}.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
    spreadsheet = stem.parent / f"{stem.name}.xlsx"
    refusals = _refusals(table, grid, frame)
    if refusals:
        spreadsheet.unlink(missing_ok=True)
    else:
        _write_spreadsheet(frame, spreadsheet)
    published = _PUBLISHED_MD5.get(table.name)
    return KitFiles(
        offered=None if refusals else spreadsheet,
        refusals=refusals,
        namesake=published is not None and hashlib.md5(table.path.read_bytes()).hexdigest() != published,
        notes=_notes(table, refusals, predictions),
    )


def _fill(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Gives rows without a value the kit's name for none; False where no row has one, so that the column says nothing.

    A value such as `NA` is none to the kit.
    """
    shown = kit_column([row[name] for row in rows])
    if all(value is None for value in shown):
        return False
    for row, value in zip(rows, shown, strict=True):
        row[name] = _NO_VALUE if value is None else value
    return True


def _refusals(table: QuestionSet, grid: Grid, frame: pd.DataFrame) -> tuple[str, ...]:
    """Why the kit cannot score predictions for a table, by its code; empty where it can."""
    wanted = ("index", "question", "image", *(("answer",) if table.has_answers else ()), "A", "B")
    reasons = []
    if absent := [name for name in wanted if name not in grid.written]:
        reasons.append(f"it has no column spelt {', '.join(absent)}")
    if grid.literal:
        reasons.append(f"the kit reads other rows, for the quotation marks of row {_few(grid.literal)}")
    if grid.damaged:
        reasons.append(f"row {_few(grid.damaged)} holds bytes that are no UTF-8, which the kit cannot read")
    if grid.odd_indices:
        reasons.append(f"the kit reads the index as {_few(grid.odd_indices)}, which is no whole number")
    if bare := [question.index for question in table.questions if question.image_key is None]:
        reasons.append(f"{len(bare)} rows have no picture, and the kit leaves such rows out of its table")
    if "history" in frame:
        reasons.append("the kit does not show earlier turns")
    held = {question.index for question in table.questions}
    if is_circular(table.name) and (alone := {q.group for q in table.questions} - held):
        reasons.append(
            f"it has no row with the index {_few(sorted(alone))} of a question, and in circular evaluation the kit "
            "leaves such questions out"
        )
    if is_circular(table.name) and max((abs(index) for index in frame["index"]), default=0) > _EXACT_IN_FLOAT:
        reasons.append("an index is beyond 2^53, which the kit rounds in circular evaluation")
    longest = max((len(cell) for column in frame for cell in frame[column] if isinstance(cell, str)), default=0)
    if longest > _LONGEST_CELL:
        reasons.append(f"a cell has {longest} characters, and a spreadsheet holds {_LONGEST_CELL}")
    return tuple(reasons)


def _notes(table: QuestionSet, refusals: Sequence[str], predictions: Mapping[int, str]) -> tuple[str, ...]:
    name = table.path.name
    notes = []
    if refusals:
        notes.append(f"{name} is not for the public kit: {'; '.join(refusals)}.")
    if unseen := [question.index for question in table.questions if question.index in table.kit_unseen]:
        notes.append(
            f"{name}: {len(unseen)} rows (index {_few(unseen)}) have a text that reads None, NA or the like. It is an "
            "empty cell to the public kit, so that such an option does not exist; here it stands as it is written."
        )
    texts = list(predictions.values())
    if texts and (lost := sum(value is None for value in kit_column(texts))):
        notes.append(f"{name}: {lost} answers are empty or read None, NA or the like; the public kit reads `nan`.")
    return tuple(notes)


def _few(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _write_spreadsheet(frame: pd.DataFrame, path: Path) -> None:
    """xlsx with every text as text: an answer may start with "=", or hold control characters, which are dropped.

    Numbers that a spreadsheet would round are written as text, which the kit reads as the whole number.
    """
    clean = frame.map(lambda cell: ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell)
    for name in ("index", "g_index"):
        if name in clean and max((abs(number) for number in clean[name]), default=0) > _EXACT_IN_FLOAT:
            clean[name] = clean[name].map(str)
    with pd.ExcelWriter(path, engine="openpyxl") as writer:
        clean.to_excel(writer, index=False)
        for row in writer.book.active.iter_rows():
            for cell in row:
                if cell.data_type == "f":
                    cell.data_type = "s"
