"""`parrot data check`: reads record files once and finds what training would stop at, leave out or change.

Memory does not grow with the files but for 16 bytes a record (duplicates) and a few dozen for each picture.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from parrot_sys.data.check_report import CheckReport, FileReport, Tally
from parrot_sys.data.config import DataConfig, DataSource
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.data.control_tokens import control_tokens
from parrot_sys.data.datasets import without_label
from parrot_sys.data.decoding import PictureNotes, inspect_image, load_image
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.layouts import layout_name
from parrot_sys.data.packing import expanded_lengths, remaining_labels
from parrot_sys.data.parts import moves_images, turn_parts
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.records import Record, content_digest, describe_record, parse_record
from parrot_sys.data.remote.storage import RemoteStorage
from parrot_sys.data.sources.base import RecordSource
from parrot_sys.data.sources.registry import open_source
from parrot_sys.data.templates import TEMPLATES
from parrot_sys.errors import DataError, StorageError

Pictures = Literal["decode", "header", "skip"]
_BLOCK = 256  # records whose texts are encoded, and whose pictures are read, at once
_KNOWN_PICTURES = 1 << 20  # pictures that are not read again when another record has them
_OF_TEMPLATES = tuple(token for template in TEMPLATES.values() for token in template.special_tokens)
_USUAL_TOKENS = ("<s>", "</s>", "<unk>", "<|endofchunk|>", *_OF_TEMPLATES)
"""Control tokens that are looked for when there is no tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckSetup:
    """Settings that the files are checked against."""

    data: DataConfig
    processor: ParrotProcessor | None
    """Of the model to be trained, with the rules of `data`; None checks neither lengths nor ids."""
    num_visual_rows: int
    max_seq_len: int
    vocab_size: int
    pictures: Pictures = "decode"
    """`decode` reads every picture whole, `header` its first bytes, `skip` only looks whether it is there."""


def check_files(setup: CheckSetup, on_progress: Callable[[int], None] = lambda read: None) -> CheckReport:
    """One pass over all data sets.

    Args:
        setup: what to check for.
        on_progress: called now and then with the bytes read since the last call.
    """
    report = CheckReport()
    digests: array[int] = array("Q")
    places: list[tuple[int, FileReport]] = []  # first number of each file's records among all
    numbers: array[int] = array("q")
    with ThreadPoolExecutor(setup.data.num_workers, "parrot-check") as threads:
        for source in setup.data.sources():
            one = _FileCheck(setup, source, threads)
            places.append((len(digests), one.report))
            report.files.append(one.report)
            one.run(digests, numbers, on_progress)
    _find_duplicates(report, digests, numbers, places)
    return report


@dataclass(frozen=True, slots=True)
class _Length:
    rows: int
    """Rows of a sample, cut."""
    problem: str | None
    """Why it has no label."""
    too_long: bool


class _FileCheck:
    """The pass over one file."""

    def __init__(self, setup: CheckSetup, source: DataSource, threads: ThreadPoolExecutor) -> None:
        self.setup, self.source, self.threads = setup, source, threads
        self.report = FileReport(path=source.path)
        self.pictures: dict[bytes, str | int] = {}  # hash of a name -> what is wrong with the file, or its rows
        tokenizer = setup.processor.tokenizer if setup.processor is not None else None
        control = sorted(_USUAL_TOKENS if tokenizer is None else control_tokens(tokenizer), key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self.notes = PictureNotes()

    def run(self, digests: array[int], numbers: array[int], on_progress: Callable[[int], None]) -> None:
        """Reads the file; one that breaks off, and a damaged archive of images, are problems of its report."""
        data = self.setup.data
        try:
            self.source.fetch(RemoteStorage(data.remote, data.cache_dir))
            source = open_source(self.source.path)
            self.images = ImageRoot(
                self.source.image_root,
                allow_outside=data.allow_outside_root,
                cache_dir=data.cache_dir,
                remote=data.remote,
                own=list(filter(None, [source.pictures()])),
            )
            for block in _blocks(self._records(source, on_progress), _BLOCK):
                self._check_block(block)
                digests.extend(map(content_digest, block))
                numbers.extend(record.index for record in block)
        except DataError as error:
            self.report.unreadable = str(error)
        self.report.pictures.notes = self.notes.counts()

    def _records(self, source: RecordSource, on_progress: Callable[[int], None]) -> Iterator[Record]:
        """The records that can be parsed; the others go into the report."""
        report = self.report
        for index, raw in enumerate(source.records(on_progress)):
            report.records += 1
            if isinstance(raw, Mapping):
                report.layouts.add(layout_name(raw))
            try:
                yield parse_record(raw, index, self.source.path, language=self.source.language)
            except DataError as error:
                report.bad.add("wrong record", str(error))

    def _check_block(self, records: Sequence[Record]) -> None:
        pictures = self._check_pictures(records)
        lengths = self._check_lengths(records, pictures)
        for record, found, length in zip(records, pictures, lengths, strict=True):
            problem = next((each for each in found if isinstance(each, str)), None)
            place = describe_record(self.source.path, record.index, record.record_id)
            self._check_texts(record, place)
            for kind, reason in (("picture", problem), ("no label", length.problem)):
                if reason is not None:
                    self.report.bad.add(kind, f"{place}: {reason}")
                    break
            else:
                if not length.too_long or self.setup.data.on_long_sample == "truncate":
                    self.report.usable += 1
                    self.report.longest = max(self.report.longest, length.rows)
                    self.report.languages.add(record.language)
                    self.report.kinds.add("text only" if not record.images else "with images")

    def _check_texts(self, record: Record, place: str) -> None:
        report = self.report
        for turn in record.turns:
            report.roles.add(turn["from"])
        if len(record.images) > 1:
            report.markers.add("several images", place)
        if any(map(moves_images, record.turns)):
            report.markers.add("image after words", place)
        if record.text_markers:
            report.markers.add("<image> that is text", place)
        texts = [part.text for turn in record.turns for part in turn_parts(turn, "in_place") if part.kind == "text"]
        for name in {found for text in texts for found in self.control_pattern.findall(text)}:
            report.control_tokens.add(name, place)

    def _check_lengths(self, records: Sequence[Record], pictures: Sequence[Sequence[str | int]]) -> list[_Length]:
        setup, report = self.setup, self.report
        if setup.processor is None:
            return [_Length(0, None, False)] * len(records)
        result = []
        encoded = setup.processor.encode([setup.processor.render(record.turns) for record in records])
        for record, found, (ids, labels) in zip(records, pictures, encoded, strict=True):
            place = describe_record(self.source.path, record.index, record.record_id)
            own = np.array([each if isinstance(each, int) else setup.num_visual_rows for each in found], np.int64)
            rows, full = expanded_lengths(ids, own, setup.max_seq_len)
            kept = remaining_labels(ids, labels, own, setup.max_seq_len)
            report.rows[full] += 1
            too_long = full > setup.max_seq_len
            if too_long:
                report.long.add("cut" if setup.data.on_long_sample == "truncate" else "too long", place)
            if 0 < kept < np.count_nonzero(labels[1:] != IGNORE_ID):
                report.lost.add("a part of the answers", place)
            if not kept:
                report.lost.add("every answer", place)
            for number in np.unique(ids[ids >= setup.vocab_size]).tolist():
                report.unknown_ids.add(f"{setup.processor.tokenizer.convert_ids_to_tokens(number)!r} = {number}", place)
            judged = not too_long or setup.data.on_long_sample == "truncate"
            problem = without_label(full, setup.max_seq_len) if not kept and judged else None
            result.append(_Length(rows, problem, too_long))
        return result

    def _check_pictures(self, records: Sequence[Record]) -> list[list[str | int]]:
        """For each picture of each record what is wrong with it, or its rows."""
        hashed = {name: hashlib.blake2b(name.encode(), digest_size=8).digest() for r in records for name in r.images}
        new = [name for name, key in hashed.items() if key not in self.pictures]
        found = dict(zip(new, self.threads.map(self._check_picture, new), strict=True))
        for name, result in found.items():
            if isinstance(result, str) or len(self.pictures) < _KNOWN_PICTURES:
                self.pictures[hashed[name]] = result
        results = {name: found[name] if name in found else self.pictures[key] for name, key in hashed.items()}
        return [[results[name] for name in record.images] for record in records]

    def _check_picture(self, name: str) -> str | int:
        setup, pictures = self.setup, self.report.pictures
        if (problem := self.images.problem(name)) is not None:
            pictures.count_bad()
            return problem
        try:
            picture, facts = self.images.picture(name), None
            if setup.pictures != "skip":
                facts = inspect_image(picture, setup.data.image_limits)
            if setup.pictures == "decode":
                load_image(
                    picture,
                    exif=setup.data.exif,
                    transparency=setup.data.transparency,
                    limits=setup.data.image_limits,
                    notes=self.notes,
                )
            processor, rows = setup.processor, setup.num_visual_rows
            rows = rows if processor is None else len(processor.rows_of(picture, rows).source)
        except StorageError:
            raise
        except DataError as error:
            pictures.count_bad()
            return str(error)
        if facts is not None:
            pictures.count(facts)
        return rows


def _blocks(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while block := list(itertools.islice(records, size)):
        yield block


def _find_duplicates(
    report: CheckReport, digests: array[int], numbers: array[int], places: Sequence[tuple[int, FileReport]]
) -> None:
    """Records with the texts and images of an earlier one, in any of the files."""
    if not digests:
        return
    values = np.frombuffer(digests, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first = np.searchsorted(ordered, ordered[repeats])
    starts = [start for start, _ in places]

    def place(number: int) -> str:
        file = places[int(np.searchsorted(starts, number, side="right")) - 1][1]
        return describe_record(file.path, numbers[number])

    for i in np.argsort(order[repeats])[: Tally.EXAMPLES]:
        report.duplicates.add("repeated", f"{place(order[repeats[i]])} repeats {place(order[first[i]])}")
    if len(repeats):
        report.duplicates.counts["repeated"] = len(repeats)
