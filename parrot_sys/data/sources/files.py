"""Files that make up a data set: one file, all of a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from parrot_sys.data.sources.base import FileState
from parrot_sys.errors import DataError, StorageError, printable


def has_files(path: Path, endings: Sequence[str]) -> bool:
    """Whether a data set at this path would be files with such endings (in lower case)."""
    if path.is_dir():
        return any(_ends(name, endings) for _, _, names in os.walk(path) for name in names)
    return _ends(path.name, endings)


def list_files(path: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a data set, sorted.

    Raises:
        DataError: there is none.
    """
    if path.is_dir():
        found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    elif glob.has_magic(str(path)) and not path.exists():
        found = [Path(each) for each in glob.glob(str(path), recursive=True)]
    else:
        found = [path]
    files = sorted(file for file in found if _ends(file.name, endings))
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"data set {printable(path)} is missing: no file that ends in {' or '.join(endings)} is there")
    return files


def file_states(files: Sequence[Path], base: Path) -> list[FileState]:
    """States of files, named as seen from the data set.

    Raises:
        DataError: one cannot be read.
    """
    states = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise DataError(f"data set {printable(file)} cannot be read: {error.strerror}") from error
        name = os.path.relpath(file, base if base.is_dir() else base.parent)
        states.append((name, status.st_size, status.st_mtime_ns))
    return states


def changed(path: Path) -> StorageError:
    """The error for a data set that is no longer what its index says."""
    return StorageError(
        f"data set {printable(path)} has changed since its index was read: start again, and the index is built anew"
    )


def _ends(name: str, endings: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(endings)) and not name.startswith(".")
