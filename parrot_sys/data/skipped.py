"""SkippedRecords: the file that lists every record that a run left out, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_records.jsonl"


class SkippedRecords:
    """One JSON object a line, `{"data_set", "reason"}`; each record is listed once, also after a restart.

    Every rank finds other records while it trains and writes a file of its own; the first one's also has all that were
    found before the first step.
    """

    def __init__(self, output: str | Path, rank: int) -> None:
        """
        Args:
            output: folder of the run.
            rank: data-parallel rank; the first one's file is `skipped_records.jsonl`.
        """
        name = SKIPPED_FILE if rank == 0 else SKIPPED_FILE.replace(".", f".rank-{rank}.", 1)
        self._path = Path(output) / name
        self.holds_all = rank == 0
        self._known: set[str] | None = None

    def add(self, data_set: str, reasons: Iterable[str]) -> None:
        """Appends those that are not there yet. A disk that does not take them is a warning: training goes on."""
        lines = [json.dumps({"data_set": data_set, "reason": reason}) for reason in reasons]
        if not lines:
            return
        try:
            if self._known is None:
                text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
                self._known = set(text.splitlines())
            new = [line for line in dict.fromkeys(lines) if line not in self._known]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in new)
            self._known.update(new)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error.strerror)
