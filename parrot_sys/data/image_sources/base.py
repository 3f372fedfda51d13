"""ImageSource: what every place of pictures answers."""

from __future__ import annotations

import posixpath
from typing import Protocol

from parrot_sys.data.image_files import ImageFile
from parrot_sys.errors import printable

_SHOWN = 400  # characters of a name in a message: some records hold a whole picture in place of a name


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
