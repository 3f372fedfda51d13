"""ImageSource: what every place of pictures answers, and a file that reads a stretch of another one."""

from __future__ import annotations

import errno
import io
import os
import posixpath
from typing import Any, Protocol

from parrot_sys.data.image_files import ImageFile, OpenFile
from parrot_sys.errors import printable

_SHOWN = 400  # characters of a name in a message: some records hold a whole picture in place of a name
_BUFFER = 1 << 20


class ImageSource(Protocol):
    """A place of pictures. `problem` may be called from several threads, pictures may be read from them."""

    def problem(self, name: str) -> str | None:
        """Why the picture of this name cannot be used, as far as is known without reading it; None where it can."""

    def picture(self, name: str) -> ImageFile:
        """The picture of a name that has no problem, for `load_image`. Its `str` is the same in every process."""

    def forget(self) -> None:
        """Frees what `problem` keeps in memory and `picture` does not need."""


def shown(name: object) -> str:
    """A name for a message."""
    text = str(name)
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def inner_name(name: str) -> str | None:
    """The plain form of a name inside an archive; None for one that leads out of it."""
    plain = posixpath.normpath(name)
    return None if plain.startswith("/") or plain.split("/", 1)[0] == ".." else plain


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
    return io.BufferedReader(section, min(max(size, 1), _BUFFER))


class _Section(io.RawIOBase):
    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._position = descriptor, start, size, 0

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
        data = os.pread(self._descriptor, count, self._start + self._position)
        if not data:
            raise OSError(errno.EIO, "the archive ends inside it")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
