"""Pictures that stand in the records themselves, as data URLs."""

from __future__ import annotations

import base64
import hashlib
import re

from parrot_sys.data.image_files import EncodedImage, ImageFile
from parrot_sys.errors import DataError, printable

PREFIX = "data:"
KEY = "data:sha256:"
"""Opens the name of a picture that was a data URL; its hash follows."""
_HEAD = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def decode_base64(text: str) -> bytes:
    """Content of a base64 text, also over several lines or as a data URL.

    Raises:
        ValueError: it is neither.
    """
    head = _HEAD.match(text)
    return base64.b64decode("".join(text[head.end() if head else 0 :].split()), validate=True)


class DataUrls:
    """Data URLs as a source of pictures."""

    def problem(self, name: str) -> str | None:
        """Why a data URL cannot be used; None where it can."""
        try:
            decode_url(name)
        except DataError as error:
            return str(error)
        return None

    def picture(self, name: str) -> ImageFile:
        """The picture, for `load_image`."""
        return EncodedImage(data := decode_url(name), f"{KEY}{hashlib.sha256(data).hexdigest()}")

    def forget(self) -> None:
        """Nothing to free."""


def decode_url(url: str) -> bytes:
    """Content of a data URL.

    Raises:
        DataError: it is no data URL in base64.
    """
    try:
        if _HEAD.match(url) is None:
            raise ValueError("wanted data:TYPE;base64,...")
        return decode_base64(url)
    except ValueError as error:
        start = url if len(url) <= 60 else f"{url[:60]}..."
        raise DataError(f"image {printable(start)} is no data URL in base64: {error}") from None
