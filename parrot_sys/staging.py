"""Folders that are prepared under another name, and take the place of what was there only when they are complete."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NEW, _OLD = ".tmp", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def scratch_directory(beside: Path) -> Iterator[Path]:
    """An empty folder beside `beside` that is gone after the block, or, when the process is killed in it, after the
    next start (`remove_leftovers`)."""
    beside = beside.absolute()
    beside.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(beside)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=_NEW, dir=beside.parent))
    folder.chmod(0o777 & ~_umask())
    with _held(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A folder that takes the place of `path` when the block has ended well; until then `path` is as it was."""
    with scratch_directory(path) as folder:
        yield folder
        _replace(folder, path.absolute())


def remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed have left beside `path`, and brings back what they had moved away."""
    path = path.absolute()
    pattern = f".{glob.escape(path.name)}.*"
    for old in sorted(path.parent.glob(pattern + _OLD)):
        if not path.exists():
            old.rename(path)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for folder in path.parent.glob(pattern + _NEW):
        with _held(folder) as free:
            if free and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def _replace(folder: Path, path: Path) -> None:
    if not path.exists():
        folder.rename(path)
    elif not _exchanged(folder, path):  # then `folder` holds what was there before
        old = folder.with_suffix(_OLD)
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps two folders at once, where the system and the file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds a lock on a folder as long as this process lives; False where another one does, or nobody can say."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        free = False
    else:
        free = True
    try:
        yield free
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
