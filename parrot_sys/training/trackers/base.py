"""The protocol of experiment trackers: where the numbers, pictures and settings of a run go besides metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """Facts of a run that a tracker gets before the first record."""

    output: Path
    """Directory of the run; what a tracker writes on this machine goes below it."""
    project: str
    """Group of runs that are compared with each other."""
    name: str
    """Of this run."""
    config: Mapping[str, Any]
    """The resolved configuration as plain values, nested by section."""
    environment: Mapping[str, Any]
    """Facts of this machine as `parrot info` shows them, and the number of processes."""
    start_step: int
    """Steps that were done before; above 0 where a run goes on."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a record."""

    name: str
    """With the kind of the record, such as `train/loss/zh`."""
    value: float
    description: str
    """A sentence on it; may be empty."""


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image with the text that belongs to it."""

    image: Image
    caption: str


class Tracker(Protocol):
    """A tracker of one run; only the first process has one. It may raise anything: the run then goes on without it."""

    def write_numbers(self, step: int, numbers: Sequence[Number]) -> None:
        """Takes the numbers of a record."""

    def write_images(self, step: int, name: str, images: Sequence[CaptionedImage]) -> None:
        """Takes images that belong together, such as the sample answers of a step."""

    def close(self, *, failed: bool = False) -> None:
        """No more will come, as the run ended, or ended with an error; blocks until all is written."""


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `model.moe.topk`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
