"""From an image file to the vision tower's input: pad to a square, resize, crop, normalise.

Follows transformers' CLIPImageProcessor (Pillow version) step by step in the same precision, and the padding of the
released Parrot code (AIDC-AI/Parrot, parrot/utils/mm_utils.py: expand2square).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from parrot_sys.data.decoding import Exif, ImageInput, ImageLimits, PictureNotes, Transparency, load_image
from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields
from parrot_sys.towers import TOWERS, Tiling

_LONGEST_SIDE = 2**15
_STRIP_PIXELS = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """Turns images into float32 arrays [3, height, width]."""

    height: int
    width: int
    shortest_edge: int | None = None
    """Resize so that the shorter side has this length, then crop the centre; None resizes to height x width."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC.value
    pad_to_square: bool = True
    """Pad the shorter side with the mean colour first (`image_aspect_ratio: pad`)."""
    exif: Exif = "apply"
    """Whether the EXIF orientation turns a picture; part of the saved settings."""
    transparency: Transparency = "white"
    """The paper below transparent pixels, or `drop`; part of the saved settings."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Largest pictures; a matter of the machine, not of the model."""
    notes: PictureNotes = field(default_factory=PictureNotes, compare=False, repr=False)
    """Counts of pictures that needed to be turned, laid on paper, ..."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.shortest_edge is not None and self.shortest_edge < max(self.height, self.width):
            raise ConfigError(
                f"image processor: size.shortest_edge must be at least the crop size {self.height}x{self.width}, "
                f"got {self.shortest_edge}"
            )

    def _check_values(self) -> None:
        for name, size in (("height", self.height), ("width", self.width), ("shortest_edge", self.shortest_edge)):
            if size is not None and size < 1:
                raise ConfigError(f"image processor: size.{name} must be >= 1, got {size}")
        for name, values in (("image_std", self.std), ("rescale_factor", (self.rescale_factor,))):
            if not all(value > 0 and math.isfinite(value) for value in values):
                raise ConfigError(f"image processor: {name} must be finite and > 0, got {list(values)}")
        if not all(map(math.isfinite, self.mean)):
            raise ConfigError(f"image processor: image_mean must be finite, got {list(self.mean)}")
        if self.resample not in list(Image.Resampling):
            known = ", ".join(f"{each.value} ({each.name.lower()})" for each in Image.Resampling)
            raise ConfigError(f"image processor: resample must be one of {known}, got {self.resample}")

    @staticmethod
    def for_tower(tower: str, image_size: int) -> ImageProcessor:
        """Settings that a kind of tower (`vision.type`) was trained with.

        Raises:
            ConfigError: unknown kind.
        """
        if tower not in TOWERS:
            raise ConfigError(f"vision.type must be one of {', '.join(TOWERS)}, got {tower!r}")
        pixels = TOWERS[tower].pixels
        return ImageProcessor(
            height=image_size,
            width=image_size,
            shortest_edge=image_size if pixels.crop else None,
            mean=pixels.mean,
            std=pixels.std,
            rescale_factor=pixels.rescale_factor,
        )

    @staticmethod
    def from_dict(
        values: Mapping[str, Any], *, image_aspect_ratio: str | None, file: object = "preprocessor_config.json"
    ) -> ImageProcessor:
        """From preprocessor_config.json (`file`) of a CLIP or SigLIP, and `image_aspect_ratio` of Parrot's config.json.

        A file that says nothing about EXIF belongs to a model whose training ignored it, as the released code does.

        Raises:
            ConfigError: a value has a wrong type, or the file asks for something that is not done here.
        """
        fields = Fields(values, file)
        if image_aspect_ratio not in (None, "pad", "square"):
            raise ConfigError(f"image_aspect_ratio must be 'pad', 'square' or absent, got {image_aspect_ratio!r}")
        for flag in ("do_resize", "do_rescale", "do_normalize"):
            if not fields.get(flag, bool, True):
                raise fields.wrong(flag, "true")
        size = _sizes(fields, "size", edge="shortest_edge")
        edge = size.get("shortest_edge")
        crops = fields.get("do_center_crop", bool, edge is not None)
        if edge is not None and not crops:
            raise ConfigError(f"{file}: do_center_crop must be true with size.shortest_edge, got false")
        out = _sizes(fields, "crop_size", edge=None) if crops else size
        if crops and edge is None and out != size:
            raise ConfigError(f"{file}: crop_size must equal size {size}, got {out}")
        try:
            return ImageProcessor(
                height=out["height"],
                width=out["width"],
                shortest_edge=edge,
                mean=_three(fields, "image_mean"),
                std=_three(fields, "image_std"),
                rescale_factor=fields.get("rescale_factor", float, 1 / 255),
                resample=fields.get("resample", int, Image.Resampling.BICUBIC.value),
                pad_to_square=image_aspect_ratio == "pad",
                exif=_choice(fields, "exif", get_args(Exif), "ignore"),
                transparency=_choice(fields, "transparency", get_args(Transparency), "white"),
            )
        except ConfigError as error:
            raise (error if str(file) in str(error) else ConfigError(f"{file}: {error}")) from error

    def to_dict(self) -> dict[str, Any]:
        """Contents of a preprocessor_config.json that transformers and `from_dict` understand."""
        square = {"height": self.height, "width": self.width}
        crops = self.shortest_edge is not None
        return {
            "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
            "image_aspect_ratio": "pad" if self.pad_to_square else "square",
            "exif": self.exif,
            "transparency": self.transparency,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.shortest_edge} if crops else square,
            "resample": self.resample,
            **({"do_center_crop": True, "crop_size": square} if crops else {}),
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, source: ImageInput) -> npt.NDArray[np.float32]:
        """Float32 [3, height, width].

        Raises:
            DataError: the image cannot be read.
        """
        image = self._load(source)
        resample = Image.Resampling(self.resample)
        if self.pad_to_square and image.width != image.height:
            size = (self.width, self.height) if self.shortest_edge is None else (self.shortest_edge,) * 2
            image = _resize_padded(image, tuple(int(mean / self.rescale_factor) for mean in self.mean), size, resample)
        else:
            image = image.resize(self._resized(image), resample=resample)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return self._normalized(image.crop((left, top, left + self.width, top + self.height)))

    def tiles(self, source: ImageInput, tiling: Tiling) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
        """Float32 [tiles, 3, height, width] of a picture that is cut into tiles, and its own (height, width).

        The first is the whole picture; the others are its tiles line by line, on black.

        Raises:
            DataError: the image cannot be read.
        """
        image = self._load(source)
        resample, side = Image.Resampling(self.resample), tiling.tile
        high, wide = tiling.resolution(image.height, image.width)
        height, width = tiling.resized(image.height, image.width)
        paper = Image.new("RGB", (wide, high))
        paper.paste(image.resize((width, height), resample=resample), ((wide - width) // 2, (high - height) // 2))
        pieces = [image.resize((side, side), resample=resample)]
        pieces += [
            paper.crop((left, top, left + side, top + side))
            for top in range(0, high, side)
            for left in range(0, wide, side)
        ]
        return np.stack([self._normalized(piece) for piece in pieces]), (image.height, image.width)

    def _load(self, source: ImageInput) -> Image.Image:
        return load_image(source, exif=self.exif, transparency=self.transparency, limits=self.limits, notes=self.notes)

    def _normalized(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Float32 [3, h, w] of the pixels."""
        pixels, values = np.asarray(image), _values(self.rescale_factor, self.mean, self.std)
        normalized = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, plane in enumerate(normalized):
            np.take(values[channel], pixels[:, :, channel], out=plane, mode="clip")  # (no value is out of range)
        return normalized

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Width and height before the crop."""
        if self.shortest_edge is None:
            return self.width, self.height
        short, long = sorted(image.size)
        longer = int(self.shortest_edge * long / short)
        return (self.shortest_edge, longer) if image.width <= image.height else (longer, self.shortest_edge)


def _resize_padded(
    image: Image.Image, color: tuple[int, ...], size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """The image in the middle of a square of `color` (rounded towards the top left), resized to `size`.

    The square is never whole in memory: a picture of 1 x 100,000 pixels would make one of 30 GB. Pillow resizes row by
    row, then column by column, with 8-bit values between; here the rows are made and resized in strips, which gives
    the same result.
    """
    if max(image.size) > _LONGEST_SIDE:  # (the square would have more than 10^9 pixels, too many to go through)
        image = image.reduce(-(-max(image.size) // _LONGEST_SIDE))
    side, width = max(image.size), size[0]
    left, top = (side - image.width) // 2, (side - image.height) // 2
    paper = Image.new("RGB", (side, 1), color).resize((width, 1), resample=resample)
    rows = paper.resize((width, side), resample=Image.Resampling.NEAREST)
    step = max(1, _STRIP_PIXELS // side)
    for start in range(0, image.height, step):
        whole = step >= image.height
        piece = image if whole else image.crop((0, start, image.width, min(start + step, image.height)))
        strip = piece
        if image.width < side:
            strip = Image.new("RGB", (side, piece.height), color)
            strip.paste(piece, (left, 0))
        rows.paste(strip.resize((width, piece.height), resample=resample), (0, top + start))
    return rows.resize(size, resample=resample)


@functools.lru_cache(maxsize=32)
def _values(scale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """[3, 256] each value of each channel, rescaled and normalised."""
    # float64 for the rescaling, float32 after it: as CLIPImageProcessor, so that results agree bit by bit.
    pixels = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)[:, None]
    normalized = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return np.ascontiguousarray(normalized.T)


def _choice(fields: Fields, name: str, allowed: tuple[str, ...], default: str) -> Any:
    if (value := fields.get(name, str, default)) not in allowed:
        raise fields.wrong(name, " or ".join(allowed))
    return value


def _three(fields: Fields, name: str) -> tuple[float, float, float]:
    red, green, blue = fields.items(name, float, 3)
    return red, green, blue


def _sizes(fields: Fields, name: str, *, edge: str | None) -> dict[str, int]:
    """A size as a dict; old files hold one number: the shorter side of `size`, both sides of `crop_size`."""
    if isinstance(size := fields.values.get(name), int):
        size = fields.require(name, int)
        return {edge: size} if edge else {"height": size, "width": size}
    sides = Fields(fields.require(name, dict), fields.file, f"{name}.")
    if set(sides.values) != {"height", "width"} and (edge is None or set(sides.values) != {edge}):
        wanted = "height and width" + (f" or {edge}" if edge else "")
        raise ConfigError(f"{fields.file}: {name} must hold {wanted}, got {sides.values}")
    return {side: sides.require(side, int) for side in sides.values}
