"""Folders that `energon prepare` made: WebDataset shards with `.nv-meta`, which says which belong to a split.

What a sample is follows from `dataset.yaml`: captions, questions with answers and choices through its field map, or a
crude data set, whose samples are those of a WebDataset. Code (`sample_loader.py`) is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from parrot_sys.config_values import read_yaml
from parrot_sys.data.sources.base import Advance, FileState, ignore_progress
from parrot_sys.data.sources.files import file_states
from parrot_sys.data.sources.webdataset import WebDatasetRecords
from parrot_sys.errors import ConfigError, DataError, printable
from parrot_sys.files import read_json

META = ".nv-meta"
_SPLITS = ("split.yaml", "split.json")
_DATASET = "dataset.yaml"
_CRUDE = "Crude"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_FIELDS = {
    "Captioning": ("image", "caption"),
    "VQA": ("image", "context", "answers"),
    "MultiChoiceVQA": ("image", "context", "choices", "correct_choice_idx"),
}
"""Kind of sample -> fields of it that a record is made of."""


class EnergonRecords(WebDatasetRecords):
    """One split of an energon data set: `DIR` is its `train`, `DIR#val` another one."""

    NAME = "energon"

    @classmethod
    def takes(cls, path: Path) -> bool:
        """A folder that has `.nv-meta`."""
        return (_folder(path)[0] / META).is_dir()

    def all_files(self) -> list[Path]:
        """The shards of the split, in the order of the file that lists them."""
        folder, split = _folder(self.path)
        meta = self._meta(_SPLITS)
        parts = meta.get("split_parts")
        names = parts.get(split) if isinstance(parts, Mapping) else None
        if not isinstance(names, list):
            known = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else "none"
            raise DataError(f"data set {printable(folder)} has no split {split!r}; it has {known} ({folder}#SPLIT)")
        excluded = self._excluded
        shards = [each for name in names for each in expand_braces(str(name)) if each not in excluded]
        if not shards:
            raise DataError(f"split {split!r} of data set {printable(folder)} has no shard")
        if outside := next((name for name in shards if ".." in Path(name).parts or Path(name).is_absolute()), None):
            raise DataError(f"data set {printable(folder)}: the shard {printable(outside)} leads out of the folder")
        return [folder / name for name in shards]

    def state(self) -> list[FileState]:
        """States of the shards and of what says how to read them."""
        meta = _folder(self.path)[0] / META
        used = [meta / name for name in (*_SPLITS, _DATASET) if (meta / name).is_file()]
        return file_states([*self.files(), *used], _folder(self.path)[0])

    def digest(self, advance: Advance = ignore_progress) -> str:
        """Hash of the shards and of what says how to read them."""
        settings = json.dumps([self._dataset, sorted(self._excluded), _folder(self.path)[1]], sort_keys=True)
        return hashlib.sha256(f"{super().digest(advance)} {settings}".encode()).hexdigest()

    def record(self, row: Mapping[str, Any], names: Mapping[str, str]) -> Any:
        """The raw record of a sample, by its kind."""
        if not self._kind:
            return super().record(row, names)
        values = {name: _access(row, self._field_map[name]) for name in _FIELDS[self._kind]}
        question, answer = "", values.get("caption", "")
        if self._kind == "VQA":
            answers = values["answers"]
            question, answer = f"\n{values['context']}", answers[0] if isinstance(answers, list) else answers
        turn = {"from": "human", "value": f"<image>{question}"}
        if self._kind == "MultiChoiceVQA":
            choices = values["choices"]
            turn |= {"value": f"<image>\n{values['context']}", "input": ", ".join(map(str, choices))}
            answer = choices[int(values["correct_choice_idx"])]
        return {
            "id": row["__key__"],
            "image": values["image"],
            "conversations": [turn, {"from": "gpt", "value": str(answer).strip()}],
        }

    def is_wanted(self, shard: Path, key: str) -> bool:
        """Whether a sample is not excluded."""
        return f"{shard.relative_to(_folder(self.path)[0]).as_posix()}/{key}" not in self._excluded

    @cached_property
    def _kind(self) -> str:
        """Kind of sample; empty for a crude data set."""
        described = self._dataset.get("sample_type") or self._dataset
        name = str(described.get("__class__", "")) if isinstance(described, Mapping) else ""
        kind = name.removesuffix("Webdataset").removesuffix("Sample")
        if kind == _CRUDE or self._as_rows:
            return ""
        folder = _folder(self.path)[0]
        if kind in _FIELDS and all(field in self._field_map for field in _FIELDS[kind]):
            return kind
        raise ConfigError(
            f"{printable(folder / META / _DATASET)}: samples of {name or 'no type'} with the fields "
            f"{sorted(self._field_map)} have no record; read are {', '.join(sorted(_FIELDS))} with a field_map of "
            f"their fields, and {_CRUDE}Webdataset. Write {printable(folder / 'columns.yaml')} (docs/data.md)"
        )

    @cached_property
    def _field_map(self) -> Mapping[str, str]:
        fields = self._dataset.get("field_map")
        return {str(name): str(value) for name, value in fields.items()} if isinstance(fields, Mapping) else {}

    @cached_property
    def _dataset(self) -> dict[str, Any]:
        return self._meta((_DATASET,))

    @cached_property
    def _excluded(self) -> frozenset[str]:
        """Shards, and samples as `SHARD/KEY`."""
        excluded = self._meta(_SPLITS).get("exclude") or []
        return frozenset(each for name in excluded for each in expand_braces(str(name)))

    def _meta(self, names: Sequence[str]) -> dict[str, Any]:
        """Content of the first of these files of `.nv-meta` that is there."""
        folder = _folder(self.path)[0] / META
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise DataError(f"{printable(folder)} has no {names[0]}: run `energon prepare` on it")
        return read_json(path) if path.suffix == ".json" else read_yaml(path)


def expand_braces(pattern: str) -> list[str]:
    """`shard_{000..002}.tar` and `{a,b}` as the names that they mean."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if (bounds := _RANGE.fullmatch(match[1])) is not None:
        first, last = int(bounds[1]), int(bounds[2])
        width = max(len(bounds[1]), len(bounds[2])) if "0" in (bounds[1][0], bounds[2][0]) else 0
        step = 1 if last >= first else -1
        choices = [str(i).zfill(width) for i in range(first, last + step, step)]
    elif len(choices) == 1:
        return [pattern]
    return [
        f"{pattern[: match.start()]}{choice}{rest}"
        for choice in choices
        for rest in expand_braces(pattern[match.end() :])
    ]


def _folder(path: Path) -> tuple[Path, str]:
    """Folder and split of a data set."""
    name, found, split = path.name.partition("#")
    return (path.with_name(name), split) if found else (path, "train")


def _access(row: Mapping[str, Any], field: str) -> Any:
    """Value that a field map names: `jpg`, `json[caption]`, `jpg,png` (the first that is there).

    Raises:
        DataError: none is there.
    """
    for option in field.split(","):
        match = _FIELD.fullmatch(option.strip())
        parts = [] if match is None else [match[1], *re.findall(r"\[([^\[\]]+)\]", match[2])]
        value: Any = row
        for part in parts:
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                break
        else:
            return value
    raise DataError(f"has no {field}; it has {', '.join(printable(name) for name in row if name != '__key__')}")
