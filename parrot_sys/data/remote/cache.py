"""DiskCache: bytes by key in a folder that several processes share and that never grows over its limit."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)
_CHECKSUM = 4
_KEPT = 0.9  # share of the limit that is left when room is made, so that this is rare
_PARTIAL = ".tmp"


class DiskCache:
    """An entry has a checksum: a damaged one is as good as none. What was not read for the longest time goes first."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        """
        Args:
            folder: created when the first entry is written.
            limit: most bytes of all entries; 0 keeps nothing.
        """
        self.folder, self.limit = Path(folder), limit
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The bytes that were put under a key; None if they are no longer there."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        data = content[:-_CHECKSUM]
        if len(content) < _CHECKSUM or zlib.crc32(data) != int.from_bytes(content[-_CHECKSUM:], "little"):
            logger.warning("%s is damaged; it is fetched again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keeps bytes under a key; more than the limit, or on a full disk, are not kept."""
        size = len(data) + _CHECKSUM
        if size > self.limit:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                total = self._total(file)
                if total + size > self.limit:
                    total = self._shrink(int(self.limit * _KEPT) - size)
                replaced = path.stat().st_size if path.exists() else 0
                file.truncate(0)  # (opened to append: what is written comes first then)
                file.write(str(total + size - replaced).encode())
                partial = path.with_name(path.name + _PARTIAL)
                partial.write_bytes(data + zlib.crc32(data).to_bytes(_CHECKSUM, "little"))
                partial.replace(path)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("remote files cannot be kept in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file that holds the size of all entries; one writer at a time."""
        with (self.folder / "size").open("a+b", buffering=0) as file:
            with contextlib.suppress(OSError):  # (where files cannot be locked, the size is not exact)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _total(self, file: BinaryIO) -> int:
        file.seek(0)
        text = file.read()
        return int(text) if text.isdigit() else self._shrink(self.limit)

    def _shrink(self, target: int) -> int:
        """Deletes the entries that were not read for the longest time; bytes of those that are left."""
        entries = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                if path.suffix == _PARTIAL:  # of a process that was killed: only the holder of the lock writes
                    path.unlink()
                    continue
                status = path.stat()
                entries.append((status.st_mtime_ns, path, status.st_size))
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= target:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
        return total
