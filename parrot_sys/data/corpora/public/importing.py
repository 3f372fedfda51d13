"""`parrot data import`: a public set in the file it was published as -> records to train on."""

from __future__ import annotations

import glob
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from parrot_sys.data.corpora.public.sets import SOURCES, Example, SourceName, examples
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.records import describe_record, parse_record
from parrot_sys.errors import ConfigError, DataError, printable
from parrot_sys.files import replace_text
from parrot_sys.paths import INPUT, INPUT_FILE, NEW_FILE

_REMEDY = "pass the folder that holds all images as --images"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataImportConfig:
    """Turns a public data set into records for `data.paths`, with the images left where they are.

    Pass --images as data.image_roots in training.
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
    """File to write (.json)."""
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
        if self.output.suffix != ".json":
            raise ConfigError(f"output must end in .json, got {self.output}")
        if SOURCES[self.source].has_images and self.images is None:
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


def import_set(config: DataImportConfig) -> ImportReport:
    """Reads, converts, checks and writes; the output appears only when it is complete.

    Raises:
        DataError: the file or the directory of images is missing or unreadable; a row is bad (names it) and is not to
            be skipped; no row is left.
        ConfigError: the output exists.
    """
    if config.output.exists() and not config.overwrite:
        raise ConfigError(f"{config.output} exists: choose another --output, or pass --overwrite")
    source = SOURCES[config.source]
    images = _images(config.images)
    for file in (config.input, config.questions):
        if file is not None and not file.is_file():
            raise DataError(f"{file} is missing; wanted the file of {config.source} as it was published")
    files = [config.input] if config.questions is None else [config.input, config.questions]
    try:
        rows = list(source.read(*files))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{config.input} is no file of {config.source}: rows look like {source.wanted}") from error
    bar = tqdm(rows, desc=f"import {config.source}", unit=" rows", disable=not sys.stderr.isatty())
    records, bad = [], []
    for index, example in examples(source, bar, config.source, config.seed):
        try:
            records.append(_record(example, index, config, images))
        except DataError as error:
            bad.append(str(error))
            if config.on_bad_row == "error":
                raise DataError(f"{error}; fix it, or leave such rows out with --on-bad-row skip") from None
    if not records:
        raise DataError(f"{config.input} has no usable row" + (f"; the first: {bad[0]}" if bad else ""))
    if config.limit is not None and config.limit < len(records):
        chosen = random.Random(f"{config.seed}:{config.source}").sample(range(len(records)), config.limit)
        records = [records[i] for i in sorted(chosen)]
    _write(config.output, records)
    return ImportReport(len(rows), len(records), tuple(bad))


def _images(root: Path | None) -> ImageRoot | None:
    if root is None:
        return None
    if not root.exists() and not glob.has_magic(str(root)):
        raise DataError(f"--images {root} must be the directory of the images, or an archive; it does not exist")
    return ImageRoot(root, remedy=_REMEDY)


def _record(
    example: Example | DataError, index: int, config: DataImportConfig, images: ImageRoot | None
) -> dict[str, Any]:
    """A record that has passed all checks, its image among them."""
    if isinstance(example, DataError):
        raise DataError(f"{describe_record(config.input, index)}: {example}")
    record: dict[str, Any] = {"id": f"{config.source}-{example.record_id or index}"}
    if example.images and images is not None:
        problems = {name: images.problem(name) for name in example.images}
        found = next((name for name, problem in problems.items() if problem is None), None)
        if found is None:
            tried = printable(", ".join(example.images))
            raise DataError(
                f"{describe_record(config.input, index, example.record_id)}: its image is not in {config.images} "
                f"(looked for {tried}): {problems[example.images[0]]}"
            )
        record["image"] = found
    record |= {"lang": "en", "conversations": list(example.turns)}
    parse_record(record, index, config.input)
    return record


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
