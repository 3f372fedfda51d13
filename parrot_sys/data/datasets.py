"""Data sets on disk: which of their records are used, and how many rows each sample takes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from parrot_sys.data.config import DataConfig, DataSource
from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_sources.data_urls import PREFIX
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.index.access import IndexPlace, load_index
from parrot_sys.data.index.lengths import Lengths, sample_lengths
from parrot_sys.data.index.record_index import RecordIndex
from parrot_sys.data.languages import canonical
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import Record, content_digest, describe_record, parse_record
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.data.skipped import SKIPPED_FILE
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import DataError, StorageError

logger = logging.getLogger(__name__)
_LISTED = 20  # records named in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordDataset:
    """The usable records of one data set, read when they are needed. n records."""

    source: DataSource
    records: RecordSource
    index: RecordIndex
    numbers: npt.NDArray[np.int64]
    """[n] place of each record in the data set."""
    rows: npt.NDArray[np.int32]
    """[n] rows of each sample, cut to max_seq_len."""
    is_long: npt.NDArray[np.bool_]
    """[n] True where rows are cut."""
    skipped: tuple[str, ...]
    """One message for each record that was left out."""
    images: ImageRoot

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def digest(self) -> str:
        """Hash of the data set."""
        return self.index.digest

    @property
    def picture_counts(self) -> npt.NDArray[Any]:
        """[n] pictures of each record."""
        return self.index.picture_counts[self.numbers]

    @property
    def has_images(self) -> npt.NDArray[np.bool_]:
        """[n] whether a record has an image."""
        return self.index.picture_counts[self.numbers] > 0

    @property
    def known_languages(self) -> list[str]:
        """Languages of the records, sorted."""
        used = np.unique(self.index.spoken[self.numbers]).tolist()
        return sorted({self._languages[i] for i in used})

    def speaks(self, language: str) -> npt.NDArray[np.bool_]:
        """[n] whether a record is in this language."""
        places = [i for i, name in enumerate(self._languages) if name == language]
        return np.isin(self.index.spoken[self.numbers], places)

    @property
    def _languages(self) -> list[str]:
        """Language of each value of `index.spoken`."""
        default = self.source.language
        return [canonical(default) or default, *self.index.languages]

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Some records, in the order of `indices`.

        Raises:
            StorageError: the data set is no longer what was indexed.
        """
        numbers = [int(self.numbers[i]) for i in indices]
        raws = self.records.read([(a, b) for a, b in self.index.places[numbers].tolist()])
        return [self._parse(raw, number) for raw, number in zip(raws, numbers, strict=True)]

    def _parse(self, raw: Any, number: int) -> Record:
        stored = self.index.pictures_of(number)  # data URLs have short names there
        with contextlib.suppress(DataError):
            record = parse_record(raw, number, self.source.path, language=self.source.language)
            named = zip(record.images, stored, strict=False)  # (the digest tells whether there are as many)
            images = tuple(short if name.startswith(PREFIX) else name for name, short in named)
            record = replace(record, images=images)
            if content_digest(record) == int(self.index.digests[number]):
                return record
        raise StorageError(
            f"{describe_record(self.source.path, number)} is not what was indexed in {self.index.folder}: remove that "
            "folder and start again, and the index is built anew"
        )

    def pictures(self, index: int) -> list[ImageFile]:
        """Files of the images of record `index`, in order."""
        return [self.images.picture(name) for name in self.index.pictures_of(int(self.numbers[index]))]

    def all_pictures(self) -> Iterator[ImageFile]:
        """Files of the images of all records, each name once."""
        used = np.zeros(len(self.index.picture_names), dtype=bool)
        used[self.index.pictures[np.repeat(*self._by_picture())]] = True
        return (self.images.picture(self.index.picture_names[i]) for i in np.flatnonzero(used).tolist())

    def _by_picture(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Whether each record is usable, and its pictures."""
        usable = np.zeros(len(self.index), dtype=bool)
        usable[self.numbers] = True
        return usable, self.index.picture_counts

    def describe(self, index: int) -> str:
        """The place of record `index`, for messages."""
        return _place(self.source, self.index, int(self.numbers[index]))

    def usable_digest(self) -> str:
        """Hash of which records of the data set are in use."""
        return hashlib.sha256(np.ascontiguousarray(self.numbers).data).hexdigest()


def load_dataset(
    source: DataSource,
    config: DataConfig,
    processor: ParrotProcessor,
    *,
    num_visual_rows: int,
    max_seq_len: int,
    needs_labels: bool = True,
    place: IndexPlace,
    on_progress: Callable[[], None] = lambda: None,
) -> RecordDataset:
    """Opens one data set through its index. Without `needs_labels` a sample that has no label is named and kept.

    Args:
        source: the data set.
        config: policies.
        processor: of the model to be trained.
        num_visual_rows: V of the vision tower.
        max_seq_len: most rows of a sample.
        needs_labels: see above.
        place: where indexes are kept.
        on_progress: called now and then while the index is built or waited for.

    Raises:
        DataError: the file is unreadable or nothing in it is usable; under `on_bad_sample=error` a record is wrong or
            an image missing; under `on_long_sample=error` a sample is too long. Names file, record and reason.
        ConfigError: the index that was chosen is of another tokenizer or template.
    """
    source.fetch(RemoteStorage(config.remote, config.cache_dir))
    records = open_source(source.path)
    index = load_index(records, processor, place, on_progress=on_progress)
    images = ImageRoot(
        source.image_root,
        allow_outside=config.allow_outside_root,
        cache_dir=config.cache_dir,
        remote=config.remote,
        own=[index.own_pictures, *filter(None, [records.pictures()])],
    )
    picture_rows, unreadable = _count_rows(index, images, processor, num_visual_rows, config.num_workers)
    lengths = sample_lengths(index, picture_rows, max_seq_len)
    usable, skipped = _select(source, index, images, lengths, unreadable, config, max_seq_len, needs_labels)
    numbers = np.flatnonzero(usable)
    return RecordDataset(
        source=source,
        records=records,
        index=index,
        numbers=numbers,
        rows=lengths.rows[numbers],
        is_long=lengths.full_rows[numbers] > max_seq_len,
        skipped=tuple(skipped),
        images=images,
    )


def _select(
    source: DataSource,
    index: RecordIndex,
    images: ImageRoot,
    lengths: Lengths,
    unreadable: Mapping[int, str],
    config: DataConfig,
    max_seq_len: int,
    needs_labels: bool,
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """[n] which records are used, and why others are not; stops, or names them in the log, as the policies want."""
    usable, is_long = index.is_good, lengths.full_rows > max_seq_len
    parsed = int(usable.sum())
    problems = [
        f"{describe_record(source.path, number)}{reason}"
        for number, reason in zip(index.problem_numbers.tolist(), index.problems, strict=True)
    ]
    _report_markers(source, index, config)
    judged = usable & ~is_long if config.on_long_sample != "truncate" else usable
    bad = {
        i: without_label(int(lengths.full_rows[i]), max_seq_len)
        for i in np.flatnonzero((lengths.labels == 0) & judged).tolist()
    }
    if not needs_labels:
        _report(source, [_describe(source, index, i, reason) for i, reason in bad.items()], parsed, "bad", "keep")
        bad = {}
    bad |= _records_of(index, unreadable) | _unusable_images(index, images)
    problems += [_describe(source, index, i, reason) for i, reason in sorted(bad.items())]
    _report(source, problems, len(index), "bad", config.on_bad_sample)
    usable[list(bad)] = False
    if config.on_long_sample == "truncate":
        if cut := int((is_long & usable).sum()):
            logger.warning("data set %s: %d of %d samples are cut to %d rows", source.name, cut, parsed, max_seq_len)
    else:
        long = [
            _describe(source, index, i, f"takes {lengths.full_rows[i]} rows, more than max_seq_len={max_seq_len}")
            for i in np.flatnonzero(is_long & usable).tolist()
        ]
        _report(source, long, int(usable.sum()), "long", config.on_long_sample)
        usable &= ~is_long
        problems += long
    if not usable.any():
        raise DataError(
            f"data set {source.path} has no usable record" + (f"; the first: {problems[0]}" if problems else "")
        )
    return usable, problems


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


def _describe(source: DataSource, index: RecordIndex, number: int, reason: str) -> str:
    return f"{_place(source, index, number)}: {reason}"


def _place(source: DataSource, index: RecordIndex, number: int) -> str:
    return describe_record(source.path, number, index.ids[number])


def _report_markers(source: DataSource, index: RecordIndex, config: DataConfig) -> None:
    """Says once what is done with image markers that do not open their turn, or that stand for no image."""
    parsed = int(index.is_good.sum())
    if config.image_position == "front" and len(moved := index.moved):
        logger.warning(
            "data set %s: in %d of %d records an image follows words and is moved to the start of its turn, the "
            "first: %s; data.image_position=in_place leaves it where it is",
            *(source.name, len(moved), parsed, _place(source, index, int(moved[0]))),
        )
    if len(literal := index.text_markers):
        logger.warning(
            "data set %s: %d of %d records hold %s where no image belongs, which is read as text, the first: %s",
            *(source.name, len(literal), parsed, IMAGE_TOKEN, _place(source, index, int(literal[0]))),
        )


def without_label(rows: int, max_seq_len: int) -> str:
    """Why a sample of so many rows, which has no label, has none."""
    if rows <= max_seq_len:
        return "has no label: nothing of its answers bears loss"
    return f"has no label: of its {rows} rows max_seq_len={max_seq_len} cuts away every answer"


def _unusable_images(index: RecordIndex, images: ImageRoot) -> dict[int, str]:
    """Number of a record -> reason, where an image is missing or must not be read."""
    problems = enumerate(map(images.problem, index.picture_names))
    reasons = {number: reason for number, reason in problems if reason is not None}
    images.forget()
    return _records_of(index, reasons)


def _records_of(index: RecordIndex, reasons: Mapping[int, str]) -> dict[int, str]:
    """Reasons of pictures -> number of each record with such a picture, and its reason."""
    if not reasons:
        return {}
    is_bad = np.zeros(len(index.picture_names), dtype=bool)
    is_bad[list(reasons)] = True
    places = np.flatnonzero(is_bad[index.pictures])
    records = np.searchsorted(index.picture_ends, places, side="right")
    pictures = index.pictures[places].tolist()
    return {record: reasons[picture] for record, picture in zip(records.tolist(), pictures, strict=True)}


def _count_rows(
    index: RecordIndex, images: ImageRoot, processor: ParrotProcessor, num_visual_rows: int, num_workers: int
) -> tuple[int | npt.NDArray[np.int64], dict[int, str]]:
    """Rows of every picture, or of each one of the index; place of a picture -> reason where they cannot be told.

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

    with ThreadPoolExecutor(num_workers, "parrot-sizes") as threads:
        found = list(threads.map(look, index.picture_names))
    rows = np.array([each if isinstance(each, int) else num_visual_rows for each in found], dtype=np.int64)
    return rows, {i: each for i, each in enumerate(found) if isinstance(each, str)}
