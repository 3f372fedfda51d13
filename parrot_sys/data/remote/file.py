"""StoredFile: a file that archives read by position, here or behind an address."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, Protocol

from parrot_sys.data.image_files import OpenFile, check_regular
from parrot_sys.data.remote.storage import RemoteState, RemoteStorage
from parrot_sys.errors import DataError, StorageError, printable

_SECTION_BUFFER = 1 << 20
_SEQUENTIAL_BUFFER = 1 << 23
_LOOK_AGAIN = 60.0  # seconds for which a remote file is taken to be what it was


class StoredFile(Protocol):
    """One file. It must not change while it is in use: that is checked when it is read."""

    @property
    def name(self) -> str:
        """Path or address."""

    @property
    def place(self) -> PurePath:
        """The same as a path, for the parts of its name."""

    @property
    def state(self) -> tuple[int, int]:
        """Size, and a number that is another one when the content is."""

    def section(self, start: int, size: int) -> OpenFile:
        """A stretch of the file, as a file.

        Raises:
            StorageError: the file is no longer what it was, or cannot be read.
        """

    def open(self) -> IO[bytes]:
        """The whole file, for reading it from one end to the other.

        Raises:
            StorageError: as above.
        """

    def for_arrow(self) -> Any:
        """A remote file as pyarrow opens it.

        Raises:
            StorageError: as above.
        """

    def lockable(self) -> int:
        """A file that processes of this machine lock while they work on this one; the caller closes it."""

    def check(self) -> None:
        """
        Raises:
            StorageError: as above.
        """


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            DataError: it is missing or no regular file; the reason, without its name.
        """
        self.place, self.name = path, str(path)
        try:
            self.state = _state(os.stat(path))
            check_regular(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error

    def section(self, start: int, size: int) -> OpenFile:
        """A stretch of the file, as a file."""
        return open_section(self.descriptor(), start, size)

    def open(self) -> IO[bytes]:
        """The whole file, without a buffer: who looks for headers skips most of it."""
        return os.fdopen(self.descriptor(), "rb", buffering=0)

    def for_arrow(self) -> Any:
        """Its path."""
        self.check()
        return self.name

    def lockable(self) -> int:
        """The file itself."""
        return self.descriptor()

    def check(self) -> None:
        """Raises if it is no longer what it was."""
        os.close(self.descriptor())

    def descriptor(self) -> int:
        """The open file, which the caller closes.

        Raises:
            StorageError: it is no longer what it was when it was opened first.
        """
        try:
            descriptor = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"image archive {printable(self.name)} cannot be opened: {error.strerror}") from error
        if _state(os.fstat(descriptor)) != self.state:
            os.close(descriptor)
            raise _changed(self.name)
        return descriptor


class RemoteFile:
    """A file behind an address.

    Stretches come through the cache on disk; whether the file has changed is asked now and then.
    """

    def __init__(self, url: str, storage: RemoteStorage) -> None:
        """
        Raises:
            DataError: it is not there.
            StorageError: the storage does not answer.
        """
        self.name, self._storage = url, storage
        self.place = PurePosixPath("/" + url.split("://", 1)[-1])
        self.state: RemoteState = storage.state(url)
        self._checked = time.monotonic()

    def section(self, start: int, size: int) -> OpenFile:
        """A stretch of the file, read at once."""
        self.check()
        return io.BytesIO(self._storage.read(self.name, self.state, start, size))

    def open(self) -> IO[bytes]:
        """The whole file; what is read of it goes past the cache."""
        self.check()
        raw: Any = _RemoteReader(self, keep=False)
        return io.BufferedReader(raw, _SEQUENTIAL_BUFFER)

    def for_arrow(self) -> Any:
        """The whole file; pyarrow asks for the same stretches again and again, so they are cached."""
        self.check()
        return _RemoteReader(self, keep=True)

    def lockable(self) -> int:
        """A file in the folder of the cache."""
        self._storage.cache.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(self.name.encode()).hexdigest()[:32]
        return os.open(self._storage.cache.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def check(self) -> None:
        """Raises if it is no longer what it was."""
        if time.monotonic() - self._checked > _LOOK_AGAIN:
            if self._storage.state(self.name) != self.state:
                raise _changed(self.name)
            self._checked = time.monotonic()

    def read(self, start: int, size: int, *, keep: bool) -> bytes:
        """Bytes of the file, as many as there are."""
        size = max(0, min(size, self.state.size - start))
        return self._storage.read(self.name, self.state, start, size, keep=keep)


def open_section(descriptor: int, start: int, size: int) -> OpenFile:
    """A stretch of a file as a file of its own.

    It keeps its own position and reads with `pread`, so threads and forked processes that share the descriptor do not
    move each other's.

    Args:
        descriptor: closed together with the result.
        start: first byte.
        size: bytes.
    """
    section: Any = _Section(descriptor, start, size)
    return io.BufferedReader(section, min(max(size, 1), _SECTION_BUFFER))


class _Positioned(io.RawIOBase):
    """A file of a known size whose bytes come from `_read_at`."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        data = self._read_at(self._position, count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read_at(self, start: int, count: int) -> bytes:
        raise NotImplementedError  # subclasses read: a section of an open file, or of a remote one


class _Section(_Positioned):
    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__(size)
        self._descriptor, self._start = descriptor, start

    def _read_at(self, start: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, self._start + start)
        if not data:
            raise OSError(errno.EIO, "the archive ends inside it")
        return data

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _RemoteReader(_Positioned):
    def __init__(self, file: RemoteFile, *, keep: bool) -> None:
        super().__init__(file.state.size)
        self._file, self._keep = file, keep

    def _read_at(self, start: int, count: int) -> bytes:
        return self._file.read(start, count, keep=self._keep)


def _state(status: os.stat_result) -> tuple[int, int]:
    """Size and time of the last change: other ones mean another content."""
    return status.st_size, status.st_mtime_ns


def _changed(name: str) -> StorageError:
    return StorageError(
        f"image archive {printable(name)} has changed since its index was read: start again, and the "
        "index is built anew"
    )
