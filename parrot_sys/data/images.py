"""From an image file to the vision tower's input: pad to a square, resize, crop, normalise.

Follows transformers' CLIPImageProcessor (Pillow version) step by step in the same precision, and the padding of the
released Parrot code (AIDC-AI/Parrot, parrot/utils/mm_utils.py: expand2square).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.files import Fields

ImageSource: TypeAlias = Image.Image | str | Path | bytes
"""A decoded image, a file name, or the bytes of an image file."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Constants of the public CLIP preprocessor_config.json."""


def load_image(source: ImageSource) -> Image.Image:
    """The image in RGB, fully decoded.

    Raises:
        DataError: missing, or not an image that can be decoded; names file and reason.
    """
    name = "given as bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"image {name} is missing") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error, ...
        raise DataError(f"image {name} cannot be read: {type(error).__name__}: {error}") from error


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
        """What a tower of type `clip`, `siglip` or `efficientnet_lite0` was trained with.

        Raises:
            ConfigError: unknown type.
        """
        half, mean, std = (0.5, 0.5, 0.5), (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)
        side = image_size
        if tower == "clip":
            return ImageProcessor(height=side, width=side, shortest_edge=side, mean=CLIP_MEAN, std=CLIP_STD)
        if tower == "siglip":
            return ImageProcessor(height=side, width=side, mean=half, std=half)
        if tower == "efficientnet_lite0":  # (x - 127) / 128, exactly
            return ImageProcessor(height=side, width=side, mean=mean, std=std, rescale_factor=1.0)
        raise ConfigError(f"vision.type must be clip, siglip or efficientnet_lite0, got {tower!r}")

    @staticmethod
    def from_dict(
        values: Mapping[str, Any], *, image_aspect_ratio: str | None, file: object = "preprocessor_config.json"
    ) -> ImageProcessor:
        """From preprocessor_config.json (`file`) of a CLIP or SigLIP, and `image_aspect_ratio` of Parrot's config.json.

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

    def __call__(self, source: ImageSource) -> npt.NDArray[np.float32]:
        """Float32 [3, height, width].

        Raises:
            DataError: the image cannot be read.
        """
        image = load_image(source)
        if self.pad_to_square:
            image = _pad_to_square(image, tuple(int(mean / self.rescale_factor) for mean in self.mean))
        image = self._resize_and_crop(image)
        # float64 for the rescaling, float32 after it: as CLIPImageProcessor, so that results agree bit by bit.
        pixels = (np.asarray(image).astype(np.float64) * self.rescale_factor).astype(np.float32)
        normalized = (pixels - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return np.ascontiguousarray(normalized.transpose(2, 0, 1))

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        resample = Image.Resampling(self.resample)
        if self.shortest_edge is None:
            return image.resize((self.width, self.height), resample=resample)
        short, long = sorted(image.size)
        longer = int(self.shortest_edge * long / short)
        size = (self.shortest_edge, longer) if image.width <= image.height else (longer, self.shortest_edge)
        image = image.resize(size, resample=resample)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def _pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of `color` (rounded towards the top left)."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


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
