"""Findings of `parrot data check`: as plain values for JSON, and as text for people."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parrot_sys.data.decoding import PictureFacts
from parrot_sys.errors import printable

_RATIOS = (2.0, 5.0, 20.0)
"""Limits of the classes of aspect ratios."""


@dataclass(slots=True)
class Tally:
    """Counts by name, with the first places of each."""

    EXAMPLES = 5
    NAMES = 1000
    """Names that are told apart; further ones are counted together, so that memory stays bounded."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, place: str | None = None) -> None:
        """Counts one."""
        if name not in self.counts and len(self.counts) >= self.NAMES:
            name = "(others)"
        self.counts[name] += 1
        if place is not None and len(known := self.examples.setdefault(name, [])) < self.EXAMPLES:
            known.append(place)

    @property
    def total(self) -> int:
        """All that were counted."""
        return self.counts.total()

    def plain(self) -> dict[str, Any]:
        """For JSON: name -> count, or count and first places."""
        return {
            name: {"count": count, "first": self.examples[name]} if name in self.examples else count
            for name, count in self.counts.most_common()
        }


@dataclass(slots=True)
class PictureReport:
    """Pictures of a file, each counted once."""

    files: int = 0
    bad: int = 0
    modes: Tally = field(default_factory=Tally)
    formats: Tally = field(default_factory=Tally)
    ratios: Tally = field(default_factory=Tally)
    turned: int = 0
    """Pictures with an EXIF orientation."""
    transparent: int = 0
    """Pictures with an alpha channel or a transparent colour."""
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    notes: dict[str, int] = field(default_factory=dict)
    """Pictures by the change that decoding made."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, facts: PictureFacts) -> None:
        """Counts a picture that can be read."""
        size, ratio = (facts.width, facts.height), max(facts.width, facts.height) / min(facts.width, facts.height)
        with self._lock:
            self.files += 1
            self.modes.add(facts.mode)
            self.formats.add(facts.format)
            self.turned += facts.orientation != 1
            self.transparent += facts.transparent
            limit = next((limit for limit in _RATIOS if ratio <= limit), None)
            self.ratios.add(f"up to {limit:g}:1" if limit is not None else f"over {_RATIOS[-1]:g}:1")
            area = facts.width * facts.height
            if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
                self.smallest = size
            if self.largest is None or area > self.largest[0] * self.largest[1]:
                self.largest = size

    def count_bad(self) -> None:
        """Counts one that is missing or cannot be read."""
        with self._lock:
            self.files += 1
            self.bad += 1

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "files": self.files,
            "bad": self.bad,
            "modes": self.modes.plain(),
            "formats": self.formats.plain(),
            "aspect_ratios": self.ratios.plain(),
            "exif_orientation": self.turned,
            "transparent": self.transparent,
            "smallest": self.smallest,
            "largest": self.largest,
            "changed_by_decoding": self.notes,
        }


@dataclass(slots=True)
class FileReport:
    """One file."""

    path: Path
    records: int = 0
    usable: int = 0
    unreadable: str | None = None
    """Why the file cannot be read to its end."""
    bad: Tally = field(default_factory=Tally)
    layouts: Tally = field(default_factory=Tally)
    roles: Tally = field(default_factory=Tally)
    languages: Tally = field(default_factory=Tally)
    kinds: Tally = field(default_factory=Tally)
    """Usable records with and without images."""
    markers: Tally = field(default_factory=Tally)
    control_tokens: Tally = field(default_factory=Tally)
    unknown_ids: Tally = field(default_factory=Tally)
    """Tokens beyond the vocabulary."""
    long: Tally = field(default_factory=Tally)
    lost: Tally = field(default_factory=Tally)
    """Answers that `max_seq_len` cuts."""
    rows: Counter[int] = field(default_factory=Counter)
    """Rows of a sample before it is cut -> samples."""
    longest: int = 0
    """Most rows of a sample after it is cut."""
    pictures: PictureReport = field(default_factory=PictureReport)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        names = ("bad", "layouts", "roles", "languages", "kinds", "markers", "control_tokens", "unknown_ids", "long")
        return {
            "path": str(self.path),
            "records": self.records,
            "usable": self.usable,
            "unreadable": self.unreadable,
            **{name: getattr(self, name).plain() for name in names},
            "answers_lost": self.lost.plain(),
            "rows": quantiles(self.rows),
            "pictures": self.pictures.plain(),
        }


@dataclass(slots=True)
class CheckReport:
    """All files."""

    files: list[FileReport] = field(default_factory=list)
    duplicates: Tally = field(default_factory=Tally)
    reasons: list[str] = field(default_factory=list)
    """Why training would not start, or would stop at a record; none: it would start."""
    not_checked: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "would_start": not self.reasons,
            "reasons": self.reasons,
            "not_checked": self.not_checked,
            "duplicates": self.duplicates.plain(),
            "files": [file.plain() for file in self.files],
        }


def quantiles(rows: Counter[int]) -> dict[str, int]:
    """Least, median, 95th percentile and most of values that were counted; empty for none."""
    if not rows:
        return {}
    values, total = sorted(rows), rows.total()
    wanted = {"median": 0.5, "p95": 0.95}
    result, seen = {"min": values[0]}, 0
    for value in values:
        seen += rows[value]
        for name in [name for name, part in wanted.items() if seen >= part * total]:
            result[name] = value
            del wanted[name]
    return result | {"max": values[-1]}


def render(report: CheckReport) -> str:
    """The report as text."""
    lines = [line for file in report.files for line in [*_file_lines(file), ""]]
    if report.duplicates.total:
        lines += [*_listed("duplicates", report.duplicates), ""]
    lines += [f"Not checked: {each}" for each in report.not_checked]
    if not report.reasons:
        return "\n".join([*lines, "Training would start."])
    return "\n".join([*lines, "Training would not start, or would stop:", *(f"  - {r}" for r in report.reasons)])


def _file_lines(file: FileReport) -> list[str]:
    lines = [f"{printable(file.path)}: {file.records:,} records, {file.usable:,} usable"]
    if file.unreadable:
        lines.append(f"  cannot be read: {file.unreadable}")
    lines += _listed("bad", file.bad)
    if file.records:
        lines.append(_line("layouts", file.layouts))
        lines.append(_line("roles", file.roles))
        lines.append(_line("languages", file.languages))
        lines.append(_line("records", file.kinds))
    lines += _listed("markers", file.markers)
    if rows := quantiles(file.rows):
        lines.append(f"  {'rows':14} " + ", ".join(f"{name} {value:,}" for name, value in rows.items()))
    lines += _listed("long", file.long) + _listed("answers lost", file.lost)
    lines += _listed("control tokens", file.control_tokens) + _listed("unknown ids", file.unknown_ids)
    return lines + (_picture_lines(file.pictures) if file.pictures.files else [])


def _picture_lines(pictures: PictureReport) -> list[str]:
    lines = [f"  {'pictures':14} {pictures.files:,} files, {pictures.bad:,} bad"]
    if pictures.smallest is not None and pictures.largest is not None:
        sizes = " to ".join(f"{width} x {height}" for width, height in (pictures.smallest, pictures.largest))
        lines.append(f"  {'':14} {sizes}; EXIF orientation {pictures.turned:,}, alpha {pictures.transparent:,}")
        lines += [_line(name, tally) for name, tally in (("modes", pictures.modes), ("formats", pictures.formats))]
        lines.append(_line("aspect", pictures.ratios))
    return lines + [f"  {'':14} {count:,}: {printable(kind)}" for kind, count in pictures.notes.items()]


def _line(title: str, tally: Tally) -> str:
    counts = (f"{printable(name) or '(not stated)'} {count:,}" for name, count in tally.counts.most_common(20))
    more = len(tally.counts) - 20
    return f"  {title:14} " + ", ".join([*counts, *([f"and {more} more"] if more > 0 else [])])


def _listed(title: str, tally: Tally) -> list[str]:
    """A line for each name, with the first places below it."""
    lines = []
    for name, count in tally.counts.most_common(20):
        lines.append(f"  {title:14} {printable(name)}: {count:,}")
        lines += [f"  {'':16} {printable(place)}" for place in tally.examples.get(name, ())]
    return lines
