"""Records behind an address are copied to this machine, since they are read in random order, a few bytes at a time."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import posixpath
import tempfile
from pathlib import Path

from parrot_sys.data.remote.storage import RemoteState, RemoteStorage
from parrot_sys.errors import DataError, StorageError, printable

logger = logging.getLogger(__name__)
_CHUNK = 8 << 20
_STATES = ".copied.json"
_BESIDE = ".columns.yaml"


def place_of_copy(url: str, cache_dir: str | Path | None) -> Path:
    """The local path of the copy of a data set, be it a file, a folder or a pattern; it need not be there yet."""
    base = Path(cache_dir or f"{tempfile.gettempdir()}/parrot-cache-{os.getuid()}") / "records"
    plain = url.rstrip("/")
    return base / hashlib.sha256(plain.encode()).hexdigest()[:16] / posixpath.basename(plain)


def copy_records(url: str, place: Path, storage: RemoteStorage, *, columns: str | None = None) -> None:
    """Brings the copy up to date. One process of a machine does it, the others wait.

    Args:
        url: a file, a folder or a pattern.
        place: from `place_of_copy`.
        storage: reads the files.
        columns: address of the file of columns; that of the data set itself, if it has one, when not given.

    Raises:
        DataError: there is nothing at the address.
        StorageError: the storage does not answer, or the copy cannot be written.
    """
    folder = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            with contextlib.suppress(OSError):  # (where files cannot be locked, each process copies)
                fcntl.flock(lock, fcntl.LOCK_EX)
            _copy(url, folder, storage, columns)
    except OSError as error:
        raise StorageError(
            f"{printable(url)} cannot be copied to {folder}: {error.strerror}; name a folder with room in "
            "data.cache_dir"
        ) from error


def columns_of(url: str, storage: RemoteStorage) -> str | None:
    """Address of the file of columns beside a data set, or in the folder of a pattern; None where there is none."""
    address = f"{posixpath.dirname(url)}/{_BESIDE[1:]}" if glob.has_magic(url) else url.rstrip("/") + _BESIDE
    with contextlib.suppress(DataError):
        storage.state(address)
        return address
    return None


def _copy(url: str, folder: Path, storage: RemoteStorage, columns: str | None) -> None:
    files = _files(url.rstrip("/"), storage)
    if (address := columns or columns_of(url, storage)) is not None:
        files[posixpath.basename(url.rstrip("/")) + _BESIDE] = address
    wanted = {name: (address, storage.state(address)) for name, address in files.items()}
    states: dict[str, list[int]] = {}
    with contextlib.suppress(OSError, ValueError):
        states = json.loads((folder / _STATES).read_text(encoding="utf-8"))
    for name in states.keys() - wanted.keys():
        (folder / name).unlink(missing_ok=True)
    for name, (address, state) in wanted.items():
        if states.get(name) == list(state) and (folder / name).is_file():
            continue
        logger.info("copying %s (%.1f MB) to %s", address, state.size / 1e6, folder / name)
        _download(address, state, folder / name, storage)
    partial = folder / f"{_STATES}.tmp"
    partial.write_text(json.dumps({name: list(state) for name, (_, state) in wanted.items()}), encoding="utf-8")
    partial.replace(folder / _STATES)


def _files(url: str, storage: RemoteStorage) -> dict[str, str]:
    """Name in the copy -> address of each file."""
    if glob.has_magic(url):
        found: dict[str, str] = {}
        for address in storage.find(url):
            if (other := found.setdefault(posixpath.basename(address), address)) != address:
                raise DataError(
                    f"data set {printable(url)} matches {printable(other)} and {printable(address)}, and only one file "
                    "of a name can be copied: name each folder as a data set"
                )
    else:
        try:
            storage.state(url)
            found = {posixpath.basename(url): url}
        except StorageError:
            raise
        except DataError:  # a folder, or nothing
            files = storage.below(url).items()
            found = {f"{posixpath.basename(url)}/{name}": address for name, address in files}
            found = {name: address for name, address in found.items() if ".." not in name.split("/")}
    if not found:
        raise DataError(f"data set {printable(url)} is missing")
    return found


def _download(address: str, state: RemoteState, path: Path, storage: RemoteStorage) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        for start in range(0, state.size, _CHUNK):
            file.write(storage.read(address, state, start, min(_CHUNK, state.size - start), keep=False))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
