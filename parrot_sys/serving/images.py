"""Pictures of requests: from data URLs and addresses to what the model takes. Slow, so for worker threads.

The header of a picture is asked for its size before anything is decoded (`ImageLimits`, and the pixels of a request).
"""

from __future__ import annotations

from parrot_sys.data.decoding import ImageLimits, inspect_image
from parrot_sys.data.image_sources.data_urls import decode_url
from parrot_sys.data.picture import Picture
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.engine.config import AdmissionLimits
from parrot_sys.errors import DataError, ImageTooLargeError
from parrot_sys.serving.errors import ApiError, wrong
from parrot_sys.serving.remote import RemoteFetcher


class PictureReader:
    """Reads the pictures of requests."""

    def __init__(self, processor: ParrotProcessor, limits: AdmissionLimits, remote: RemoteFetcher | None) -> None:
        """
        Args:
            processor: of the model, with the limits of single pictures.
            limits: of requests.
            remote: fetches pictures behind addresses; None refuses them.
        """
        self._processor = processor
        self._limits = limits
        self._remote = remote

    def read(self, urls: list[tuple[str, str]], size: int) -> list[Picture]:
        """The pictures of one request.

        Args:
            urls: (address, place in the request) of each.
            size: bytes of the request itself.

        Raises:
            ApiError: 400 names the picture that cannot be read; 413 for one that is too large.
        """
        _checked(self._limits, None, images=len(urls))
        files, pixels = [], 0
        for url, param in urls:
            files.append(self._file(url, param, size))
            size += 0 if url[:5].lower() == "data:" else len(files[-1])  # (data URLs are part of the request)
            pixels += _pixels(files[-1], self._processor.image_processor.limits, param)
            _checked(self._limits, param, pixels=pixels, size=size)
        pictures = []
        for file, (_, param) in zip(files, urls, strict=True):
            try:
                pictures += self._processor.pictures([file])
            except DataError as error:
                raise wrong(str(error), param, "invalid_image") from None
        return pictures

    def _file(self, url: str, param: str, size: int) -> bytes:
        scheme = url[:32].partition(":")[0].lower()
        if scheme == "data":
            try:
                return decode_url(url)
            except DataError as error:
                raise wrong(str(error), param, "invalid_image_url") from None
        if scheme not in ("http", "https"):
            raise wrong(
                "a picture's url must be a data URL (data:image/png;base64,...) or begin with http:// or https://",
                param,
                "invalid_image_url",
            )
        if self._remote is None:
            raise wrong(
                "this server fetches no pictures from addresses: send a data URL (data:image/png;base64,...)",
                param,
                "remote_images_off",
            )
        most = self._limits.max_bytes
        return self._remote.fetch(url, param, max_bytes=None if most is None else max(most - size, 1))


def _pixels(file: bytes, limits: ImageLimits | None, param: str) -> int:
    """Pixels of a picture, by its header."""
    try:
        facts = inspect_image(file, limits)
    except ImageTooLargeError as error:
        raise ApiError(413, str(error), param=param, code="image_too_large") from None
    except DataError as error:
        raise wrong(str(error), param, "invalid_image") from None
    return facts.width * facts.height


def _checked(limits: AdmissionLimits, param: str | None, *, images: int = 0, pixels: int = 0, size: int = 0) -> None:
    try:
        limits.check(images=images, pixels=pixels, size=size)
    except DataError as error:
        raise ApiError(413, str(error), param=param, code="request_too_large") from None
