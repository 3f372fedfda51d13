"""The JSON file of a run: every row is in it, whole, as soon as it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("passed", "failed", "unavailable", "not_run")
# Rows of two runs belong into one file only where these agree.
IDENTITY = ("device", "driver", "torch", "triton", "sources")

Row = dict[str, Any]


class OtherRun(Exception):
    """The file holds the results of another machine or of other sources."""


class Store:
    """Results by stage and row, in `path`.

    Args:
        path: read when it exists, so that a run goes on where it stopped.
        machine: what these results come from.
        fresh: forget what the file holds.

    Raises:
        OtherRun: the file's results come from something else.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, fresh: bool = False) -> None:
        self._path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "stages": {}}
        if path.exists() and not fresh:
            self.content = load(path)
            known = self.content["machine"]
            differing = [
                f"{key} {known.get(key)} -> {machine.get(key)}"
                for key in IDENTITY
                if known.get(key) != machine.get(key)
            ]
            if differing:
                raise OtherRun(f"{path} holds the results of another run ({'; '.join(differing)})")
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self, stage: str) -> dict[str, Row]:
        """The rows of a stage so far."""
        return self._stage(stage)["rows"]

    def record(self, stage: str, name: str, row: Row) -> None:
        """Adds or replaces a row, and writes the file."""
        assert row["status"] in STATUSES, f"{name}: unknown status {row['status']!r}"
        self._stage(stage)["rows"][name] = row
        self._write()

    def end_run(self, stage: str, run: dict[str, Any], not_run: dict[str, str]) -> None:
        """Notes one call of a stage, and the rows that it did not get to with the reason."""
        content = self._stage(stage)
        content["runs"].append(run)
        for name, reason in not_run.items():
            content["rows"][name] = {"status": "not_run", "error": reason}
        self._write()

    def _stage(self, stage: str) -> dict[str, Any]:
        return self.content["stages"].setdefault(stage, {"runs": [], "rows": {}})

    def _write(self) -> None:
        """Through a second file, so that a reader, or a run that is killed, never sees half of it."""
        other = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with other.open("w") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        other.replace(self._path)


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none, or of another version of the suite.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "stages" not in content:
        raise ValueError(f"{path} is no results file of benchmarks.gpu_suite (schema {SCHEMA})")
    return content
