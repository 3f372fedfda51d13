"""Rows of public sets in files, and what an import makes of them, read as training and evaluation do."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from parrot_sys.data.corpora.public.importing import DataImportConfig, ImportReport, import_set
from parrot_sys.data.decoding import load_image
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.records import parse_record
from parrot_sys.evaluation.prompts import question_prompt
from parrot_sys.evaluation.tsv import QuestionSet, read_table


def png(shade: int = 0, size: tuple[int, int] = (12, 12)) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", size)
    image.putdata([(shade, x * 20 % 256, x * x % 256) for x in range(size[0] * size[1])])
    image.save(buffer, "PNG")
    return buffer.getvalue()


def hub(data: bytes | None, path: str = "x.png") -> dict[str, Any] | None:
    """Hugging Face's struct of a picture."""
    return None if data is None else {"bytes": data, "path": path}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def records_of(source: str, path: Path, **settings: Any) -> tuple[list[dict[str, Any]], ImportReport]:
    """The records of an import, each checked and its pictures decoded as the loader does."""
    output = path.parent / "out" / "records.json"
    report = import_set(DataImportConfig(source=source, input=path, output=output, overwrite=True, **settings))
    records = json.loads(output.read_text(encoding="utf-8"))
    for index, record in enumerate(records):
        parsed = parse_record(record, index, output)
        root = ImageRoot(settings.get("images") or path.parent)
        for name in parsed.images:
            assert root.problem(name) is None
            load_image(root.picture(name))
    return records, report


def tables_of(source: str, path: Path, **settings: Any) -> dict[str, QuestionSet]:
    """Language -> the table that an import wrote, read as `parrot eval` reads it."""
    output = path.parent / "tables" / "exam.tsv"
    report = import_set(DataImportConfig(source=source, input=path, output=output, overwrite=True, **settings))
    tables = [read_table(table) for table in report.tables]
    assert {table.suite for table in tables} == {"exam"}
    assert sum(len(table.questions) for table in tables) == report.written
    for table in tables:
        for question in table.questions:
            question_prompt(question, table.language)
            if question.image_key is not None:
                load_image(table.image(question.image_key))
    return {table.language: table for table in tables}


def turns(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]
