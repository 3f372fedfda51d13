"""Data sets on disk: checked records, and how many rows each sample takes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from parrot_sys.data.cached_arrays import read_array, write_array
from parrot_sys.data.config import DataConfig, DataSource
from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.packing import expanded_lengths, remaining_labels
from parrot_sys.data.parts import moves_images
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.data.records import Record, describe_record, parse_record
from parrot_sys.data.skipped import SKIPPED_FILE
from parrot_sys.data.tokenization import tokenizer_fingerprint
from parrot_sys.errors import DataError, StorageError

logger = logging.getLogger(__name__)
_BLOCK = 2048  # conversations tokenised in one call
_LISTED = 20  # records named in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordDataset:
    """The usable records of one file. n records."""

    source: DataSource
    records: tuple[Record, ...]
    rows: npt.NDArray[np.int32]
    """[n] rows of each sample, cut to max_seq_len."""
    is_long: npt.NDArray[np.bool_]
    """[n] True where rows are cut."""
    digest: str
    """Hash of the file."""
    skipped: tuple[str, ...]
    """One message for each record that was left out."""
    images: ImageRoot

    def pictures(self, index: int) -> list[ImageFile]:
        """Files of the images of record `index`, in order."""
        return [self.images.picture(name) for name in self.records[index].images]

    def describe(self, index: int) -> str:
        """The place of record `index`, for messages."""
        record = self.records[index]
        return describe_record(self.source.path, record.index, record.record_id)

    def usable_digest(self) -> str:
        """Hash of which records of the file are in use."""
        return hashlib.sha256(np.array([record.index for record in self.records], dtype=np.int64).data).hexdigest()


def load_dataset(
    source: DataSource,
    config: DataConfig,
    processor: ParrotProcessor,
    *,
    num_visual_rows: int,
    max_seq_len: int,
    needs_labels: bool = True,
) -> RecordDataset:
    """Reads, checks and measures one data set. Without `needs_labels` a sample that has no label is named and kept.

    Raises:
        DataError: the file is unreadable or nothing in it is usable; under `on_bad_sample=error` a record is wrong or
            an image missing; under `on_long_sample=error` a sample is too long. Names file, record and reason.
    """
    images = ImageRoot(
        source.image_root,
        allow_outside=config.allow_outside_root,
        cache_dir=config.cache_dir,
        remote=config.remote,
    )
    records, problems = _parse_records(source, images)
    digest = _file_digest(source.path)
    _report_markers(source, records, config)
    picture_rows, unreadable = _count_rows(records, images, processor, num_visual_rows, config.num_workers)
    rows, full_rows, labels = _measure(records, processor, picture_rows, max_seq_len, digest, config.cache_dir)
    is_long = full_rows > max_seq_len
    judged = ~is_long if config.on_long_sample != "truncate" else np.ones(len(records), dtype=bool)
    bad = {int(i): without_label(int(full_rows[i]), max_seq_len) for i in np.flatnonzero((labels == 0) & judged)}
    if not needs_labels:
        _report(
            source, [_describe(source, records[i], reason) for i, reason in bad.items()], len(records), "bad", "keep"
        )
        bad = {}
    bad |= unreadable | _unusable_images(records, images)
    problems += [_describe(source, records[i], reason) for i, reason in sorted(bad.items())]
    _report(source, problems, len(records) + len(problems) - len(bad), "bad", config.on_bad_sample)
    usable = np.array([i not in bad for i in range(len(records))], dtype=bool)
    long = [
        _describe(source, records[i], f"takes {full_rows[i]} rows, more than max_seq_len={max_seq_len}")
        for i in np.flatnonzero(is_long & usable)
    ]
    if config.on_long_sample == "truncate":
        if long:
            logger.warning(
                "data set %s: %d of %d samples are cut to %d rows", source.name, len(long), len(records), max_seq_len
            )
    else:
        _report(source, long, int(usable.sum()), "long", config.on_long_sample)
        usable &= ~is_long
        problems += long
    if not usable.any():
        raise DataError(
            f"data set {source.path} has no usable record" + (f"; the first: {problems[0]}" if problems else "")
        )
    kept = np.flatnonzero(usable)
    return RecordDataset(
        source=source,
        records=tuple(records[i] for i in kept),
        rows=rows[kept],
        is_long=is_long[kept],
        digest=digest,
        skipped=tuple(problems),
        images=images,
    )


def _parse_records(source: DataSource, images: ImageRoot) -> tuple[list[Record], list[str]]:
    records, problems = [], []
    for index, raw in enumerate(read_raw_records(source.path)):
        try:
            record = parse_record(raw, index, source.path, language=source.language)
            records.append(_without_pictures(record, source, images))
        except StorageError:
            raise
        except DataError as error:
            problems.append(str(error))
    return records, problems


def _without_pictures(record: Record, source: DataSource, images: ImageRoot) -> Record:
    """The record without the pictures that it holds itself, which would fill the memory: they go to disk."""
    try:
        return replace(record, images=tuple(map(images.keep, record.images)))
    except StorageError:
        raise
    except DataError as error:
        raise DataError(_describe(source, record, str(error))) from None


def _report(source: DataSource, problems: Sequence[str], total: int, kind: str, policy: str) -> None:
    """Stops at problems, or names them in the log, as `policy` wants."""
    if not problems:
        return
    listed = "\n  ".join(problems[:_LISTED])
    rest = f"\n  ... and {len(problems) - _LISTED} more ({SKIPPED_FILE} has all)" if len(problems) > _LISTED else ""
    if policy == "error":
        others = f" (1 of {len(problems)} such records)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{others}; fix it, or leave such records out with data.on_{kind}_sample=skip")
    done = "without a label" if policy == "keep" else "left out"
    logger.warning("data set %s: %d of %d records %s:\n  %s%s", source.name, len(problems), total, done, listed, rest)


def _describe(source: DataSource, record: Record, reason: str) -> str:
    return f"{describe_record(source.path, record.index, record.record_id)}: {reason}"


def _report_markers(source: DataSource, records: Sequence[Record], config: DataConfig) -> None:
    """Says once what is done with image markers that do not open their turn, or that stand for no image."""
    if config.image_position == "front":
        moved = [record for record in records if record.images and any(map(moves_images, record.turns))]
        if moved:
            logger.warning(
                "data set %s: in %d of %d records an image follows words and is moved to the start of its turn, the "
                "first: %s; data.image_position=in_place leaves it where it is",
                *(source.name, len(moved), len(records)),
                describe_record(source.path, moved[0].index, moved[0].record_id),
            )
    if literal := [record for record in records if record.text_markers]:
        logger.warning(
            "data set %s: %d of %d records hold %s where no image belongs, which is read as text, the first: %s",
            *(source.name, len(literal), len(records), IMAGE_TOKEN),
            describe_record(source.path, literal[0].index, literal[0].record_id),
        )


def without_label(rows: int, max_seq_len: int) -> str:
    """Why a sample of so many rows, which has no label, has none."""
    if rows <= max_seq_len:
        return "has no label: nothing of its answers bears loss"
    return f"has no label: of its {rows} rows max_seq_len={max_seq_len} cuts away every answer"


def _unusable_images(records: Sequence[Record], images: ImageRoot) -> dict[int, str]:
    """Place in `records` -> reason, where an image is missing or must not be read."""
    reasons = ((i, images.problem(name)) for i, record in enumerate(records) for name in record.images)
    unusable = {i: reason for i, reason in reasons if reason is not None}
    images.forget()
    return unusable


PictureCounts = int | list[npt.NDArray[np.int64]]
"""Rows of every picture, or of each picture of each record."""


def _count_rows(
    records: Sequence[Record], images: ImageRoot, processor: ParrotProcessor, num_visual_rows: int, num_workers: int
) -> tuple[PictureCounts, dict[int, str]]:
    """Rows of the pictures, and place in `records` -> reason where they cannot be told.

    Pictures that are cut into tiles are looked at every time, since their sizes decide.
    """
    if processor.tiling is None:
        return num_visual_rows, {}

    def look(name: str) -> int | str:
        if (problem := images.problem(name)) is not None:
            return problem
        try:
            return len(processor.rows_of(images.picture(name), num_visual_rows).source)
        except StorageError:
            raise
        except DataError as error:
            return str(error)

    names = sorted({name for record in records for name in record.images})
    with ThreadPoolExecutor(num_workers, "parrot-sizes") as threads:
        found = dict(zip(names, threads.map(look, names), strict=True))
    counts, unreadable = [], {}
    for i, record in enumerate(records):
        looked = [found[name] for name in record.images]
        if (problem := next((each for each in looked if isinstance(each, str)), None)) is not None:
            unreadable[i] = problem
        counts.append(np.array([each if isinstance(each, int) else num_visual_rows for each in looked], np.int64))
    return counts, unreadable


def _measure(
    records: Sequence[Record],
    processor: ParrotProcessor,
    picture_rows: PictureCounts,
    max_seq_len: int,
    digest: str,
    cache_dir: str | None,
) -> npt.NDArray[np.int32]:
    """int32 [3, n]: rows of each sample with and without truncation, and its labels, from the cache if it has them."""
    cached = None
    if cache_dir is not None:
        key = json.dumps(
            [
                "labels",
                processor.template.version,
                processor.image_position,
                processor.control_tokens,
                digest,
                tokenizer_fingerprint(processor.tokenizer),
                picture_rows if isinstance(picture_rows, int) else _digest_counts(picture_rows),
                max_seq_len,
            ]
        )
        cached = Path(cache_dir) / f"lengths-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if (lengths := _cached_lengths(cached, len(records))) is not None:
            return lengths
    lengths = np.empty((3, len(records)), dtype=np.int32)
    for start in range(0, len(records), _BLOCK):
        block = [processor.render(record.turns) for record in records[start : start + _BLOCK]]
        for i, (input_ids, labels) in enumerate(processor.encode(block), start):
            own = picture_rows if isinstance(picture_rows, int) else picture_rows[i]
            lengths[:2, i] = expanded_lengths(input_ids, own, max_seq_len)
            lengths[2, i] = remaining_labels(input_ids, labels, own, max_seq_len)
    if cached is not None:
        write_array(cached, lengths)
    return lengths


def _digest_counts(counts: Sequence[npt.NDArray[np.int64]]) -> str:
    return hashlib.sha256(np.concatenate(counts).data if counts else b"").hexdigest()


def _cached_lengths(path: Path, count: int) -> npt.NDArray[np.int32] | None:
    """int32 [3, count] of a whole file; None without one, and (with a warning) for a damaged or another one."""
    lengths = read_array(path, np.int32)
    if lengths is not None and lengths.shape != (3, count):
        logger.warning("%s is not of this data set; it is made anew", path)
        return None
    return lengths


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
