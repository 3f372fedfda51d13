"""Pictures that stand in the records themselves, as data URLs."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from parrot_sys.data.image_files import EncodedImage, ImageFile, OpenFile
from parrot_sys.data.remote.file import open_section
from parrot_sys.errors import DataError, StorageError, printable

PREFIX = "data:"
_KEY = "data:sha256:"
_HEAD = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def decode_base64(text: str) -> bytes:
    """Content of a base64 text, also over several lines or as a data URL.

    Raises:
        ValueError: it is neither.
    """
    head = _HEAD.match(text)
    return base64.b64decode("".join(text[head.end() if head else 0 :].split()), validate=True)


class DataUrls:
    """Data URLs as a source of pictures. `keep` moves them from memory to a nameless file on disk."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """
        Args:
            folder: where the file is; None takes the system's folder for temporary files.
        """
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._places: dict[str, _KeptImage] = {}
        self._size = 0

    def keep(self, url: str) -> str:
        """Stores the picture of a data URL, once for each content, and gives a short name for it.

        Raises:
            DataError: it is no data URL in base64.
        """
        data = _decode(url)
        key = _KEY + hashlib.sha256(data).hexdigest()
        if key in self._places:
            return key
        try:
            if self._file is None:
                if self._folder is not None:
                    os.makedirs(self._folder, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as its pictures
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"pictures of data URLs cannot be stored in {self._folder or tempfile.gettempdir()}: {error.strerror}; "
                "name a folder with more room in data.cache_dir"
            ) from error
        self._places[key] = _KeptImage(self._file, self._size, len(data), key)
        self._size += len(data)
        return key

    def forget(self) -> None:
        """Nothing to free: pictures that were kept are still wanted."""

    def problem(self, name: str) -> str | None:
        """Why a data URL, or what `keep` made of it, cannot be used; None where it can."""
        if name in self._places:
            return None
        try:
            _decode(name)
        except DataError as error:
            return str(error)
        return None

    def picture(self, name: str) -> ImageFile:
        """The picture, for `load_image`."""
        if (kept := self._places.get(name)) is not None:
            return kept
        return EncodedImage(data := _decode(name), f"{_KEY}{hashlib.sha256(data).hexdigest()}")


@dataclass(frozen=True, slots=True)
class _KeptImage:
    file: IO[bytes]
    start: int
    size: int
    name: str

    def open(self) -> OpenFile:
        return open_section(os.dup(self.file.fileno()), self.start, self.size)

    def __str__(self) -> str:
        return self.name


def _decode(url: str) -> bytes:
    try:
        if _HEAD.match(url) is None:
            raise ValueError("wanted data:TYPE;base64,...")
        return decode_base64(url)
    except ValueError as error:
        start = url if len(url) <= 60 else f"{url[:60]}..."
        raise DataError(f"image {printable(start)} is no data URL in base64: {error}") from None
