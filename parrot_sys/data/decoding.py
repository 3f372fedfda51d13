"""load_image: from the bytes of a picture to what a person sees, in RGB. The one place that decodes pictures.

docs/data.md has a table of what becomes of each kind of picture.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from parrot_sys.data.image_files import ImageFile, check_regular
from parrot_sys.errors import ConfigError, DataError, ImageTooLargeError, StorageError, printable

logger = logging.getLogger(__name__)

Exif = Literal["apply", "ignore"]
Transparency = Literal["white", "black", "drop"]

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Pillow's others are rare, or run a program on the file (EPS), or hide a second header with another size (ICO)."""
_PILLOW_LIMIT = 178_956_970
_MAX_ASPECT_RATIO = 1000.0
_ORIENTATION_TAG = 0x112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THE_SIDE = (5, 6, 7, 8)
"""Orientations that turn a picture by a quarter."""
_WITH_ALPHA = {"LA": "RGBA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
"""Mode with an alpha channel -> the next mode on the way to RGBA (premultiplied grey has no direct one)."""
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_PAPER = {"white": (255, 255, 255), "black": (0, 0, 0)}
_BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 258, 262, 0


ImageInput: TypeAlias = Image.Image | bytes | ImageFile
"""A decoded image, or an image file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """Largest pictures that are decoded. The header is asked, before memory is taken for any pixel."""

    max_pixels: int = 2**27
    """Width x height (default: 134 million, 0.5 GB for each thread that decodes and three times that with transparency;
    at most 178,956,970)."""
    max_aspect_ratio: float = 200.0
    """Longer side over shorter side (at most 1000)."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _PILLOW_LIMIT:
            raise ConfigError(f"image_limits.max_pixels must be from 1 to {_PILLOW_LIMIT}, got {self.max_pixels}")
        if not 1 <= self.max_aspect_ratio <= _MAX_ASPECT_RATIO:
            raise ConfigError(
                f"image_limits.max_aspect_ratio must be from 1 to {_MAX_ASPECT_RATIO:.0f}, got {self.max_aspect_ratio}"
            )

    def check(self, width: int, height: int) -> None:
        """
        Raises:
            DataError: a picture has no pixels.
            ImageTooLargeError: a picture of this size is over a limit; names size, limit and setting.
        """
        if min(width, height) < 1:
            raise DataError(f"has {width} x {height} pixels; wanted at least one")
        if width * height > self.max_pixels:
            raise ImageTooLargeError(
                f"has {width} x {height} pixels, more than image_limits.max_pixels={self.max_pixels}; make it smaller, "
                "or raise the limit"
            )
        if (ratio := max(width, height) / min(width, height)) > self.max_aspect_ratio:
            raise ImageTooLargeError(
                f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}, more than "
                f"image_limits.max_aspect_ratio={self.max_aspect_ratio:g}; cut it, or raise the limit"
            )


class PictureNotes:
    """Counts of pictures that were changed to be seen right, or were not; the first of each kind is logged."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._said: dict[str, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PictureNotes], tuple[()]]:
        return PictureNotes, ()  # in another process, another count

    def add(self, kind: str, name: str, *, level: int = logging.INFO) -> None:
        """Counts a picture of a kind, such as `turned upright`."""
        with self._lock:
            self._counts[kind] += 1
            first = self._counts[kind] == 1
        if first:
            logger.log(level, "image %s: %s (others like it are counted, not named)", name, kind)

    def counts(self) -> dict[str, int]:
        """Kind -> pictures so far; a picture that was decoded twice counts twice."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def log_counts(self) -> None:
        """Says how many pictures of each kind there were, where this was not said before."""
        counts = self.counts()
        for kind, count in counts.items():
            if count != self._said.get(kind):
                logger.info("%d images: %s", count, kind)
        self._said = counts


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFacts:
    """Facts in the header of a picture."""

    format: str
    mode: str
    """Pillow's name of what a pixel holds: RGB, L, P, CMYK, I;16, ..."""
    width: int
    height: int
    """As stored, before EXIF orientation."""
    orientation: int
    """EXIF orientation, 1 for none."""
    transparent: bool
    """Whether there is an alpha channel or a transparent colour."""
    has_more_frames: bool


def inspect_image(source: ImageInput, limits: ImageLimits | None = None) -> PictureFacts:
    """The facts about an image, without decoding it.

    Raises:
        DataError: missing, no regular file, over a limit, or no image; names file and reason.
    """
    name = _name(source)
    with _errors_of(name), _opened(source) as image:
        (limits or ImageLimits()).check(*image.size)
        return PictureFacts(
            format=image.format or "",
            mode=image.mode,
            width=image.width,
            height=image.height,
            orientation=_orientation(image),
            transparent=image.has_transparency_data,
            has_more_frames=_has_more_frames(image),
        )


def image_size(source: ImageInput, *, exif: Exif = "apply", limits: ImageLimits | None = None) -> tuple[int, int]:
    """(height, width) of what `load_image` gives, without decoding it.

    Raises:
        DataError: as `inspect_image`.
    """
    facts = inspect_image(source, limits)
    lies = exif == "apply" and facts.orientation in _ON_THE_SIDE
    return (facts.width, facts.height) if lies else (facts.height, facts.width)


def load_image(
    source: ImageInput,
    *,
    exif: Exif = "apply",
    transparency: Transparency = "white",
    limits: ImageLimits | None = None,
    notes: PictureNotes | None = None,
) -> Image.Image:
    """The image as a person sees it, in RGB, fully decoded.

    Args:
        source: what to decode; of several frames or pages the first.
        exif: `apply` turns the picture as its EXIF orientation says, `ignore` leaves it as it is stored.
        transparency: the paper below transparent pixels; `drop` shows the colours that they hide.
        limits: largest picture; the default limits when not given.
        notes: counts what was done.

    Raises:
        DataError: missing, no regular file, over a limit, or not an image that can be decoded; names file and reason.
    """
    name = _name(source)
    notes = notes or PictureNotes()
    with _errors_of(name), _opened(source) as image:
        (limits or ImageLimits()).check(*image.size)
        if _has_more_frames(image):
            notes.add("has several frames or pages: the first is taken", name)
        rawmode = _rawmode(image)
        image.load()
        turn = _TRANSPOSE.get(_orientation(image))
        picture = _to_rgb(image, rawmode, transparency, notes, name)
    if turn is None:
        return picture
    if exif == "ignore":
        notes.add("EXIF orientation is not applied, as exif=ignore says", name, level=logging.WARNING)
        return picture
    notes.add("turned as its EXIF orientation says", name)
    return picture.transpose(turn)


def image_digest(source: ImageFile) -> str:
    """SHA-256 of the contents of an image file.

    Raises:
        DataError: missing, no regular file, or it cannot be read; names file and reason.
    """
    with _errors_of(_name(source)):
        if isinstance(source, str | Path):
            check_regular(source)
        with open(source, "rb") if isinstance(source, str | Path) else source.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _name(source: ImageInput) -> str:
    if isinstance(source, bytes):
        return "given as bytes"
    if isinstance(source, Image.Image):
        return f"given as {source.mode} image of {source.width} x {source.height}"
    return printable(source)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Makes whatever goes wrong with an image a DataError that names it."""
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(
            f"image {name} cannot be read: UnidentifiedImageError: it is in none of the formats {', '.join(_formats())}"
        ) from None
    except FileNotFoundError:
        raise DataError(f"image {name} is missing") from None
    except StorageError:
        raise
    except DataError as error:
        raise type(error)(f"image {name} {error}") from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"image {name} cannot be read: {type(error).__name__}: {error}") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"image {name} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _opened(source: ImageInput) -> Iterator[Image.Image]:
    """The image with its header read; an image that is the caller's stays open."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, str | Path):
        check_regular(source)
        with Image.open(source, formats=_formats()) as image:
            yield image
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source.open()
    with file, Image.open(file, formats=_formats()) as image:
        yield image


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of FORMATS that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _has_more_frames(image: Image.Image) -> bool:
    """Whether there is a second frame or page; one that is damaged does not count."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _rawmode(image: Image.Image) -> str:
    """Layout of the pixels in the file, which Pillow forgets when it has decoded them."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # (damaged EXIF is no reason to refuse a picture: viewers show it as it is stored)
        return 1


def _to_rgb(
    image: Image.Image, rawmode: str, transparency: Transparency, notes: PictureNotes, name: str
) -> Image.Image:
    if image.mode in _DEEP_MODES:
        colours, alpha = _eight_bits(image), _deep_alpha(image)
        notes.add("more than 8 bits a pixel: scaled to 8", name)
    elif image.has_transparency_data:
        colours = _with_alpha(image, rawmode)
        alpha = colours.getchannel("A")
    elif image.mode in _PLAIN_MODES:
        colours, alpha = image, None
    else:
        raise DataError(f"has the mode {image.mode}, which is not supported; save it as RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return colours if colours.mode == "RGB" else colours.convert("RGB")  # (which would copy it)
    if transparency == "drop":
        notes.add("has transparent pixels: shown as transparency=drop says", name, level=logging.WARNING)
        return colours.convert("RGB")
    notes.add(f"has transparent pixels: laid on {transparency}", name)
    paper = Image.new("RGB", image.size, _PAPER[transparency])
    paper.paste(colours.convert("RGB"), mask=alpha)
    return paper


def _with_alpha(image: Image.Image, rawmode: str) -> Image.Image:
    """As RGBA; one colour that a PNG declares transparent is compared in the depth that Pillow decoded."""
    declared = image.info.get("transparency")
    if rawmode.endswith(";16B") and isinstance(declared, tuple):
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in declared)
    elif rawmode in ("L;2", "L;4") and isinstance(declared, int):
        image = image.copy()
        image.info["transparency"] = declared * (85 if rawmode == "L;2" else 17)
    while image.mode != "RGBA":
        image = image.convert(_WITH_ALPHA.get(image.mode, "RGBA"))
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16-bit, 32-bit or float pixels as 8-bit grey: black stays black, white stays white.

    Raises:
        DataError: nothing says which values are black and white.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    white = _white(image, low, high)
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 256):  # (in strips: float64 of a large picture would be many times its size)
        strip = values[start : start + 256].astype(np.float64) * (255 / white)
        grey[start : start + 256] = np.floor(strip + 0.5).astype(np.uint8)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey)


def _white(image: Image.Image, low: float, high: float) -> float:
    """The value that is white, of a picture with values from `low` to `high`."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        return 4095.0 if tags.get(_BITS_TAG) == (12,) else 65535.0
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535.0
    steps = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0)
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > steps[-1]:
        raise DataError(
            f"has values from {low:g} to {high:g} in its {'32-bit' if image.mode == 'I' else 'float'} pixels; wanted 0 "
            f"to {steps[0]:g} or 0 to {steps[1]:g}; save it with 8 or 16 bits a pixel"
        )
    return next(step for step in steps if high <= step)


def _deep_alpha(image: Image.Image) -> Image.Image | None:
    """Alpha of a 16-bit grey PNG that declares one value transparent."""
    declared = image.info.get("transparency")
    if not isinstance(declared, int):
        return None
    return Image.fromarray(np.where(np.asarray(image) == declared, 0, 255).astype(np.uint8))
