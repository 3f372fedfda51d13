"""Image files, by name or inside something else, before they are decoded."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from parrot_sys.errors import DataError

OpenFile: TypeAlias = io.BytesIO | io.BufferedReader


class StoredImage(Protocol):
    """An image file inside something else, such as an archive. Its `str` says where, the same in every process."""

    def open(self) -> OpenFile:
        """Its bytes, as a file with a position of its own, which the caller closes."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of an image file that is part of something else, such as a cell of a table."""

    data: bytes
    name: str
    """Where they come from, for messages: `of row 7 of questions.tsv`."""

    def open(self) -> io.BytesIO:
        """The bytes, as a file."""
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


ImageFile: TypeAlias = str | Path | StoredImage
"""A file name, or an image file inside something else."""


def check_regular(path: str | Path) -> None:
    """
    Raises:
        FileNotFoundError: nothing there.
        DataError: a pipe, a device, a socket or a folder: reading it could wait forever, or never end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise DataError(f"is a {kinds.get(stat.S_IFMT(mode), 'device')}; wanted a regular file")
