"""Score files in an output folder: reading them, and keeping results of different models apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parrot_sys.errors import ConfigError, DataError, ParrotError
from parrot_sys.evaluation.runner import SCORES_SUFFIX
from parrot_sys.files import Fields, read_json

_OWN = ("routing", "table")
"""Settings that may differ between the score files of one output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One score file that a run is going to write."""

    path: Path
    table: str
    """Digest of the table."""
    cells: frozenset[tuple[str, str]]
    """(part, language) of everything that it reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFile:
    """One score file and its contents."""

    path: Path
    content: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """Values that all score files of one output must have in common: model name, rules, checkpoint, mode, ..."""
        name = self.path.name.removesuffix(f"_{self.content['dataset']}{SCORES_SUFFIX}")
        return identity(name, self.content["rules"], self.content["settings"])

    @property
    def cells(self) -> set[tuple[str, str]]:
        """(part, language) of everything that it reports."""
        return {(part, self.content["language"]) for part in self.content["parts"]}


def identity(name: str, rules: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that all score files of one output must have in common."""
    return {"name": name, "rules": rules, **{key: value for key, value in settings.items() if key not in _OWN}}


_NEEDED: dict[str, type] = {"dataset": str, "language": str, "routing": str, "settings": dict, "parts": dict}


def read_score_files(folder: Path) -> list[ScoreFile]:
    """All score files of an output folder.

    Raises:
        DataError: a file is damaged.
    """
    files = []
    for path in sorted(folder.glob(f"*/*/*{SCORES_SUFFIX}")):
        try:
            content = read_json(path, DataError)
            for key, kind in _NEEDED.items():
                Fields(content, path).require(key, kind)
        except ParrotError as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run parrot eval again") from error
        files.append(ScoreFile(path=path, content=content))
    return files


def check_alike(files: Sequence[ScoreFile]) -> None:
    """Makes sure that files may be in one report.

    Raises:
        ConfigError: two are of different models or settings, or report the same part, language and routing.
    """
    seen: dict[tuple[str, str, str], Path] = {}
    for file in files:
        first = files[0]
        if changed := _differences(first.identity, file.identity):
            raise ConfigError(
                f"{first.path} and {file.path} do not belong into one report ({changed}); evaluate them into "
                "different --output folders, or pass --overwrite to answer everything anew"
            )
        for part, language in file.cells:
            key = (part, language, file.content["routing"])
            if key in seen:
                raise ConfigError(
                    f"{seen[key]} and {file.path} both report {part} in {language}, routing {key[2]}; "
                    "evaluate them into different --output folders"
                )
            seen[key] = file.path


def find_stale(output: Path, plans: Sequence[Plan], wanted: Mapping[str, Any], *, overwrite: bool) -> list[Path]:
    """Makes sure that what a run is going to write goes together with what `output` holds.

    The rules of files that are written again may differ: they are scored anew from the answers that are there.

    Args:
        output: of the run.
        plans: every score file of the run.
        wanted: `identity` of the run.
        overwrite: what does not go together with it may go.

    Returns:
        Score files that must go, with what belongs to them, once the run is complete; files that the run writes again
        are not among them.

    Raises:
        ConfigError: `output` holds results of another model, of other settings or of other tables.
    """
    again, stale = {plan.path for plan in plans}, []
    tables = {cell: plan.table for plan in plans for cell in plan.cells}
    for file in read_score_files(output):
        held, new = file.identity, dict(wanted)
        if file.path in again:
            new["rules"] = held["rules"]
        table = file.content["settings"]["table"]
        other = next((tables[cell] for cell in file.cells if tables.get(cell, table) != table), table)
        changed = _differences({**held, "table": table}, {**new, "table": other})
        if changed and not overwrite:
            raise ConfigError(
                f"{file.path} was made under other settings ({changed}) and would be in the same report; "
                "choose another --output, or pass --overwrite to delete it and answer everything anew"
            )
        if changed and file.path not in again:
            stale.append(file.path)
    return stale


def remove_results(score_file: Path) -> None:
    """Removes a score file with its answers and kit files."""
    stem = score_file.name.removesuffix(SCORES_SUFFIX)
    for suffix in (SCORES_SUFFIX, ".jsonl", ".xlsx", ".tsv"):
        (score_file.parent / f"{stem}{suffix}").unlink(missing_ok=True)


def _differences(held: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = sorted(key for key in {*held, *new} if held.get(key) != new.get(key))
    return ", ".join(f"{key}: {held.get(key)!r} -> {new.get(key)!r}" for key in changed)
