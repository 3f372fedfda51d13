"""`parrot data import`: a public set in the file it was published as -> records to train on, or tables to evaluate."""

from __future__ import annotations

import base64
import glob
import io
import json
import random
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from tqdm import tqdm

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.corpora.public.base import Example, Picture, Question, ask, reply
from parrot_sys.data.corpora.public.registry import SOURCES, SourceName, examples
from parrot_sys.data.corpora.public.tables import TableRow, by_language, check_question, table_path, write_table
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.languages import canonical, language_code, split_suffix
from parrot_sys.data.mcq_prompt import build_mcq_prompt
from parrot_sys.data.records import describe_record, parse_record
from parrot_sys.errors import ConfigError, DataError, printable
from parrot_sys.files import errors_named, replace_text
from parrot_sys.paths import INPUT, INPUT_FILE, NEW_FILE

_REMEDY = "pass the folder that holds all images as --images"
_LETTERS = string.ascii_uppercase


@dataclass(frozen=True, kw_only=True, slots=True)
class DataImportConfig:
    """Turns a public data set into records for `data.paths`, or a multiple-choice set into tables for `parrot eval`.

    Images that are files stay where they are: pass --images as data.image_roots in training. Tables hold theirs.
    """

    source: SourceName
    """The set."""
    input: Annotated[Path, INPUT_FILE]
    """File of the set as it was published (vqa_v2: the annotations)."""
    questions: Annotated[Path | None, INPUT_FILE] = None
    """vqa_v2: file of the questions."""
    images: Annotated[Path | None, INPUT] = None
    """Where the images are, for sets with images: a directory, a tar or Parquet file, a directory of those, or a
    pattern such as 'shards/*.tar'. COCO's may lie in it or in its folders train2017, val2014, ..."""
    output: Annotated[Path, NEW_FILE]
    """File to write: records (.json), or tables (.tsv): `cvqa.tsv` becomes a `cvqa_LANGUAGE.tsv` for each language."""
    language: str = ""
    """Language (BCP 47) of rows that do not say theirs. When not given, the set's, or the end of the input's name."""
    limit: int | None = None
    """Take so many rows, drawn at random, instead of all."""
    seed: int = 42
    """Seed of the rows that `limit` takes, and of wordings and options that a set leaves open."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row of another form, or without its image: stop, or leave it out, count it and name it."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be >= 1, got {self.limit}")
        if self.output.suffix not in (".json", ".tsv"):
            raise ConfigError(f"output must end in .json (records) or .tsv (tables), got {self.output}")
        if self.language:
            language_code(self.language)
        source = SOURCES[self.source]
        if source.has_images and not source.images_inside and self.images is None:
            raise ConfigError(f"source {self.source} has images: pass their directory as --images DIR")
        if not SOURCES[self.source].has_images and self.images is not None:
            raise ConfigError(f"source {self.source} has no images, got --images {self.images}: leave it out")
        if (self.source == "vqa_v2") != (self.questions is not None):
            raise ConfigError(
                "source vqa_v2 needs --questions FILE (v2_OpenEnded_mscoco_train2014_questions.json)"
                if self.questions is None
                else f"--questions belongs to source vqa_v2, got source {self.source}: leave it out"
            )


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Counts of the rows of a file, by what became of them."""

    read: int
    written: int
    bad: tuple[str, ...]
    """Faults of the rows that were left out."""
    tables: tuple[Path, ...] = ()
    """Tables that were written."""


def import_set(config: DataImportConfig) -> ImportReport:
    """Reads, converts, checks and writes; the output appears only when it is complete.

    Raises:
        DataError: the file or the directory of images is missing or unreadable; a row is bad (names it) and is not to
            be skipped; no row is left.
        ConfigError: the output exists, or nothing says the language of a row.
    """
    _check_new([config.output], config)
    images = _images(config.images)
    for file in (config.input, config.questions):
        if file is not None and not file.is_file():
            raise DataError(f"{file} is missing; wanted the file of {config.source} as it was published")
    convert = _record if config.output.suffix == ".json" else _table_row
    made: list[Any] = []
    bad: list[str] = []
    read = 0
    for index, example in examples(SOURCES[config.source], _rows(config), config.source, config.seed):
        read += 1
        try:
            made.append(convert(example, index, config, images))
        except DataError as error:
            bad.append(str(error))
            if config.on_bad_row == "error":
                raise DataError(f"{error}; fix it, or leave such rows out with --on-bad-row skip") from None
    if not made:
        raise DataError(f"{config.input} has no usable row" + (f"; the first: {bad[0]}" if bad else ""))
    if config.limit is not None and config.limit < len(made):
        chosen = random.Random(f"{config.seed}:{config.source}").sample(range(len(made)), config.limit)
        made = [made[i] for i in sorted(chosen)]
    tables = _write_tables(config, made) if convert is _table_row else _write(config.output, made)
    return ImportReport(read, len(made), tuple(bad), tables)


def _rows(config: DataImportConfig) -> Iterator[Any]:
    """Rows of the file, with a progress bar."""
    source = SOURCES[config.source]
    files = [config.input] if config.questions is None else [config.input, config.questions]
    rows = source.read(*files)
    with tqdm(desc=f"import {config.source}", unit=" rows", disable=not sys.stderr.isatty()) as bar:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{config.input} is no file of {config.source}: rows look like {source.wanted}"
                ) from error
            yield row
            bar.update()


def _check_new(paths: Sequence[Path], config: DataImportConfig) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not config.overwrite:
        raise ConfigError(f"{existing[0]} exists: choose another --output, or pass --overwrite")


def _images(root: Path | None) -> ImageRoot | None:
    if root is None:
        return None
    if not root.exists() and not glob.has_magic(str(root)):
        raise DataError(f"--images {root} must be the directory of the images, or an archive; it does not exist")
    return ImageRoot(root, remedy=_REMEDY)


def _record(
    example: Example | Question | DataError, index: int, config: DataImportConfig, images: ImageRoot | None
) -> dict[str, Any]:
    """A record that has passed all checks, its images among them."""
    if isinstance(example, DataError):
        raise DataError(f"{describe_record(config.input, index)}: {example}")
    language = _language(example, config)
    record: dict[str, Any] = {"id": f"{config.source}-{example.record_id or index}"}
    names = [
        _data_url(picture) if isinstance(picture, bytes) else _name(picture, example, index, config, images)
        for picture in example.pictures
    ]
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    turns = _turns(example, language, index, config) if isinstance(example, Question) else list(example.turns)
    record |= {"lang": language, "conversations": turns}
    if isinstance(example, Question) and example.category:
        record["category"] = example.category
    parse_record(record, index, config.input)
    return record


def _turns(question: Question, language: str, index: int, config: DataImportConfig) -> list[dict[str, str]]:
    """Question and answer as the benchmark's prompt has them; a letter answers a multiple choice."""
    if question.answer is None:
        raise DataError(f"{describe_record(config.input, index, question.record_id or None)}: its answer is secret")
    text = question.question if not question.hint else f"{question.hint}\n{question.question}"
    said = str(question.answer)
    if question.options:
        options = dict(zip(_LETTERS, question.options, strict=False))
        text = build_mcq_prompt(question.question, options, language, question.hint or None)
        said = _LETTERS[question.answer] if isinstance(question.answer, int) else said
    if question.pictures and IMAGE_TOKEN not in text:
        text = f"{IMAGE_TOKEN}\n" * len(question.pictures) + text
    return [ask(text), reply(said)]


def _table_row(
    example: Example | Question | DataError, index: int, config: DataImportConfig, images: ImageRoot | None
) -> TableRow:
    if isinstance(example, DataError):
        raise DataError(f"{describe_record(config.input, index)}: {example}")
    place = describe_record(config.input, index, example.record_id or None)
    if isinstance(example, Example):
        raise DataError(f"{place}: {config.source} is no set of questions with options; write records (.json)")
    try:
        check_question(example)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    picture = example.pictures[0] if example.pictures else None
    if picture is not None and not isinstance(picture, bytes):
        name = _name(picture, example, index, config, images)
        assert images is not None, "the name was found there"
        picture = _read(images.picture(name), f"{place}: its image {name}")
    return TableRow(example, _language(example, config), picture)


def _language(example: Example | Question, config: DataImportConfig) -> str:
    """Language of a row: as it says, as the user says, of the set, of the name of the file or of its folder."""
    stated = example.language if isinstance(example, Question) else ""
    stated = stated or config.language or SOURCES[config.source].language or ""
    if not stated:
        found = (split_suffix(name)[1] for name in (config.input.stem, config.input.parent.name))
        stated = next((code for code in found if code is not None), "")
    if not stated:
        raise ConfigError(f"{config.input} does not say its language: pass it as --language, such as --language pt-BR")
    return canonical(stated) or stated


def _name(
    names: Sequence[str], example: Example | Question, index: int, config: DataImportConfig, images: ImageRoot | None
) -> str:
    """The name by which a picture is there."""
    place = describe_record(config.input, index, example.record_id or None)
    if images is None:
        raise DataError(f"{place}: needs the image {printable(names[0])}: pass the directory as --images DIR")
    problems = {name: images.problem(name) for name in names}
    found = next((name for name, problem in problems.items() if problem is None), None)
    if found is None:
        tried = printable(", ".join(names))
        raise DataError(f"{place}: its image is not in {config.images} (looked for {tried}): {problems[names[0]]}")
    return found


def _read(file: ImageFile, place: str) -> bytes:
    with errors_named(place, DataError):
        if isinstance(file, str | Path):
            return Path(file).read_bytes()
        with file.open() as stream:
            return stream.read()


def _data_url(picture: Picture) -> str:
    """A picture that stands in its record."""
    assert isinstance(picture, bytes), "the caller asks for bytes"
    try:
        with Image.open(io.BytesIO(picture)) as image:
            kind = Image.MIME.get(image.format or "", "image/png")
    except (OSError, ValueError) as error:
        raise DataError(f"holds a picture that cannot be read: {error}") from None
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def _write(path: Path, records: Sequence[dict[str, Any]]) -> tuple[Path, ...]:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    return ()


def _write_tables(config: DataImportConfig, rows: Sequence[TableRow]) -> tuple[Path, ...]:
    """A table for each language.

    Raises:
        DataError: some questions of a language have answers and others have none.
    """
    tables = {table_path(config.output, code): own for code, own in by_language(rows).items()}
    _check_new(list(tables), config)
    for own in tables.values():
        if len({row.question.answer is None for row in own}) > 1:
            raise DataError(f"{config.input}: some questions in {own[0].language} have an answer and others have none")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for path, own in tables.items():
        write_table(path, own)
    return tuple(tables)
