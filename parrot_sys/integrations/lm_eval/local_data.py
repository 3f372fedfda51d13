"""Data sets of lm-eval's tasks from a folder with copies of their repositories, in place of a network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from parrot_sys.errors import DataError

_HUB = "hf://datasets/"
_CONVERTED = "refs/convert/parquet"
"""Branch of a repository on the hub with its rows in Parquet, as CONFIGURATION/SPLIT/*.parquet."""


def loader_from(root: Path, load: Callable[..., Any], builders: Collection[str]) -> Callable[..., Any]:
    """`datasets.load_dataset` that takes what tasks name from a folder.

    Args:
        root: holds the copy of OWNER/NAME in OWNER/NAME.
        load: `datasets.load_dataset`.
        builders: names that stand for a format (`json`, `csv`, ...) and not for a data set.

    Returns:
        It raises DataError where a copy is not there, needs a script, or a file is somewhere else in the network.
    """

    def load_dataset(
        path: str, name: str | None = None, data_dir: Any = None, data_files: Any = None, **more: Any
    ) -> Any:
        files = _local_files(root, data_files)
        if path in builders:
            return load(path, name=name, data_dir=data_dir, data_files=files, **more)
        folder = _copy(root, path)
        if data_files is None and data_dir is None and (converted := _converted(folder, name)):
            return load("parquet", data_files=converted, **more)
        if (script := folder / f"{folder.name}.py").is_file():
            raise DataError(
                f"{script} is a script, which `datasets` no longer runs; put the converted copy there instead: "
                f"{_command(path, folder, _CONVERTED)}"
            )
        return load(str(folder), name=name, data_dir=data_dir, data_files=files, **more)

    return load_dataset


def _copy(root: Path, path: str) -> Path:
    """Folder of a data set: below `root`, or where a task of one's own says.

    Raises:
        DataError: there is none.
    """
    for folder in (root / path, Path(path)):
        if folder.is_dir():
            return folder
    raise DataError(
        f"--data {root} has no folder {path}, which a task takes its questions from: {_command(path, root / path)}"
    )


def _command(path: str, folder: Path, revision: str | None = None) -> str:
    of = f"--revision {revision} " if revision else ""
    return f"hf download --repo-type dataset {of}{path} --local-dir {folder}"


def _converted(folder: Path, name: str | None) -> dict[str, list[str]]:
    """Split -> files of a configuration in a copy of the converted branch, which has no card; else nothing."""
    if (folder / "README.md").is_file():
        return {}
    splits = sorted(own for own in (folder / (name or "default")).glob("*") if own.is_dir())
    files = {split.name: sorted(map(str, split.glob("*.parquet"))) for split in splits}
    return {split: own for split, own in files.items() if own}


def _local_files(root: Path, files: Any) -> Any:
    """`data_files` with files of the hub's data sets below `root`.

    Raises:
        DataError: one is elsewhere in the network, or its data set is not there.
    """
    if isinstance(files, dict):
        return {split: _local_files(root, own) for split, own in files.items()}
    if isinstance(files, list | tuple):
        return [_local_files(root, own) for own in files]
    if not isinstance(files, str) or "://" not in files:
        return files
    owner, name, *rest = files.removeprefix(_HUB).split("/")
    if not files.startswith(_HUB) or not rest:
        raise DataError(
            f"a task takes its questions from {files}, and with --data nothing is asked of a network: "
            "fetch the file, and name it in `data_files` of a copy of the task (--include_path)"
        )
    return str(_copy(root, f"{owner}/{name.partition('@')[0]}").joinpath(*rest))
