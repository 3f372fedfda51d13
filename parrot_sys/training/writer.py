"""Outputs of a run: metrics.jsonl, trackers and the progress bar; only rank 0 has one that does anything."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from parrot_sys.errors import DataError
from parrot_sys.files import replace_text
from parrot_sys.parallel.agreement import on_first_rank
from parrot_sys.training.config import TrainConfig
from parrot_sys.training.trackers.base import CaptionedImage
from parrot_sys.training.trackers.registry import Trackers

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes records of plain values; on ranks other than 0 every method does nothing.

    A resumed run takes back what the interrupted one wrote after its last checkpoint, and its summary: each step stands
    there once, and the summary comes last.
    """

    def __init__(self, config: TrainConfig, *, total_steps: int, start_step: int = 0) -> None:
        """All ranks call it.

        Raises:
            ConfigError: a tracker cannot start; on every rank.
        """
        self._active = dist.get_rank() == 0
        self._total_steps = total_steps
        self._image_interval = config.logging.image_interval
        self._last_image = start_step
        on_first_rank(lambda: self._start_trackers(config, start_step))
        if not self._active:
            return
        self._path = Path(config.output) / METRICS_FILE
        cut_records(self._path, start_step, without="summary")
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc="train",
            unit="step",
            disable=not config.logging.progress,
            smoothing=0.1,
        )

    def _start_trackers(self, config: TrainConfig, start_step: int) -> None:
        from parrot_sys.training.trackers.facts import run_facts

        self._trackers = Trackers(config.logging.trackers, lambda: run_facts(config, start_step))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._bar.close()
        self._append("")
        self._file.close()
        self._trackers.close(failed=error is not None)

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        """Appends one record; trackers get its numbers, and now and then its routes as a heat map.

        Args:
            kind: `train`, `validation` or `summary`.
            step: steps done.
            record: plain values.
        """
        if not self._active:
            return
        # JSON has no NaN.
        plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
        self._append(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        if not self._trackers:
            return
        # Imported late: figures take a second, and not every run or rank draws some.
        from parrot_sys.training.trackers.facts import numbers_of, routing_image

        self._trackers.write_numbers(step, numbers_of(kind, record))
        if self._draws(kind, step) and (image := routing_image(kind, step, record)) is not None:
            self._trackers.write_images(step, f"{kind}/routing", [image])

    def write_samples(self, step: int, samples: Sequence[CaptionedImage]) -> None:
        """Trackers get sample answers."""
        if self._active and samples:
            self._trackers.write_images(step, "validation/answers", samples)

    def _draws(self, kind: str, step: int) -> bool:
        """Whether a record's routes are drawn: always of validations, else from time to time and at the end."""
        if kind != "train":
            return kind == "validation"
        due = step - self._last_image >= self._image_interval or step == self._total_steps
        if due:
            self._last_image = step
        return due

    def _append(self, line: str) -> None:
        """A full disk does not end the run: what could not be written is tried again with the next record."""
        was_behind, self._unwritten = bool(self._unwritten), self._unwritten + line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not was_behind:
                logger.error("%s cannot be written (%s); records are kept in memory until it can", self._path, error)

    def advance(self, **shown: str) -> None:
        """Moves the bar by a step; `shown` is the text after it."""
        if self._active:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._active:
            self._bar.write(line)


def shown(record: dict[str, Any], loss: float | None) -> dict[str, str]:
    """Text after the progress bar: the mean loss of a step's labels, and the rates of the last record."""
    texts = {"loss/label (this step)": "no labels" if loss is None else f"{loss:.4f}"}
    if "lr" in record:
        texts |= {"lr": f"{record['lr']:.1e}", "tok/s": f"{record['tokens_per_second']:,.0f}"}
        if "mfu" in record:
            texts["mfu"] = f"{record['mfu']:.0%}"
    return texts


def summary_line(summary: dict[str, Any], step: int, total: int) -> str:
    """The end of a run in one line."""
    loss = "no loss was measured"
    if summary["loss"] is not None:
        loss = f"loss {summary['loss']:.4f} (mean over the {summary['labels']:,} labels of the last record)"
    return (
        f"trained {summary['steps']} steps ({step} of {total}) in {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {loss}"
    )


def read_metrics(output: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run in their order, of one kind or all; a last line that a killed run left half is ignored.

    Raises:
        DataError: another line is damaged.
    """
    path = Path(output) / METRICS_FILE
    if not path.is_file():
        return []
    complete, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    records = [_parse(line, path, number) for number, line in enumerate(complete.split("\n"), 1) if complete]
    with suppress(ValueError):  # only its line end may be missing
        records += [json.loads(rest)]
    return [record for record in records if kind is None or record["kind"] == kind]


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is no JSON ({error}); delete the line") from error
    if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
        raise DataError(
            f"{path}, line {number} must be an object with kind and step, got {line[:80]!r}; delete the line"
        )
    return record


def cut_records(path: Path, last_step: int, *, without: str | None = None) -> None:
    """Drops records after `last_step`, and a line that a killed process left half-written.

    Args:
        path: file with one JSON object a line, each with a `step`; nothing happens when there is none.
        last_step: the last step that stays.
        without: kind of records that do not stay either.
    """
    if not path.is_file():
        return
    before, kept = path.read_text(encoding="utf-8"), []
    for line in before.splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= last_step and (without is None or record["kind"] != without):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    if (after := "".join(kept)) != before:
        replace_text(path, after)
