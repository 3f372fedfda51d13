"""Predictions on disk: an append-only JSONL that a killed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.files import replace_text


class PredictionStore:
    """Answers of one run over one table, by row index. The first line holds what the run depends on.

    Every answer is written and flushed at once; a line that a kill cut short is dropped on the next start. Answers that
    are to take the place of others lie beside these until `complete`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """
        Args:
            path: the JSONL file; made with its folders.
            settings: plain values that decide the answers (checkpoint, table, mode, ...).
            overwrite: start anew when the file holds answers made under other settings; these stay until `complete`.

        Raises:
            ConfigError: the file was made under other settings and `overwrite` is False.
            DataError: the file is damaged.
        """
        self.path = path
        self.records: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._target, waiting = path, path.with_name(f".{path.name}.new")
        lines, differences = self._read(settings)
        if differences and not overwrite:
            raise ConfigError(
                f"{path} holds answers made under other settings ({differences}); "
                "choose another --output, or pass --overwrite to start anew"
            )
        if differences:
            self.path = waiting
            lines, differences = self._read(settings)
        else:
            waiting.unlink(missing_ok=True)
        if not lines or differences:
            lines = [json.dumps({"settings": dict(settings)}, ensure_ascii=False)]
        for number, line in enumerate(lines[1:], 2):
            record = self._parse(line, number)
            self.records[int(record["index"])] = record
        self._rewrite(lines)
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Keeps one answer; `record["index"]` names its row."""
        self.records[int(record["index"])] = dict(record)
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def complete(self) -> None:
        """Every question is answered: the file takes the place of the one that it overwrites."""
        if self.path != self._target:
            self._file.flush()
            os.replace(self.path, self._target)
            self.path = self._target

    def close(self) -> None:
        """Closes the file; answers stay readable in `records`."""
        self._file.close()

    def __enter__(self) -> PredictionStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, settings: Mapping[str, Any]) -> tuple[list[str], str]:
        """The lines of the file, and in which settings it differs."""
        lines = self._complete_lines()
        held = self._parse(lines[0], 1).get("settings", {}) if lines else dict(settings)
        changed = sorted(key for key in {*held, *settings} if held.get(key) != settings.get(key))
        return lines, ", ".join(f"{key}: {held.get(key)!r} -> {settings.get(key)!r}" for key in changed)

    def _complete_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        # not splitlines(): an answer may hold other line separators
        return text[: text.rfind("\n")].split("\n") if "\n" in text else []

    def _rewrite(self, lines: Sequence[str]) -> None:
        """The file with only `lines`, so that appending never continues a broken line."""
        replace_text(self.path, "".join(line + "\n" for line in lines))

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            raise DataError(
                f"{self.path}, line {number} is damaged ({error}); delete the file to start anew"
            ) from error
        return dict(record)


def _refuse(constant: str) -> None:
    """Ends the reading of a record with NaN or Infinity: nothing was measured there."""
    raise ValueError(f"{constant} is no number")
