"""Tiles of a picture (AnyRes of LLaVA-NeXT): how many there are, and which of their rows a model reads.

Sizes and rules are those of transformers' LlavaNextImageProcessor and LlavaNextModel.pack_image_features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parrot_sys.errors import ConfigError
from parrot_sys.files import Fields

IntArray = npt.NDArray[np.int64]
NEWLINE = -1
"""Source of a row that is no feature: the learned vector after each line of a grid of tiles."""


RESOLUTIONS = "image_grid_pinpoints"
"""Field of config.json and preprocessor_config.json."""


def resolutions_from_hf(fields: Fields) -> tuple[tuple[int, int], ...]:
    """The (height, width) that a file of transformers lists.

    Raises:
        ConfigError: they are no pairs of whole numbers, or not there.
    """
    pairs = fields.items(RESOLUTIONS, list)
    if not all(len(pair) == 2 and all(isinstance(side, int) for side in pair) for pair in pairs):
        raise fields.wrong(RESOLUTIONS, "pairs of a height and a width")
    return tuple((height, width) for height, width in pairs)


@dataclass(frozen=True, eq=False, slots=True)
class PictureRows:
    """Rows that one picture takes among those of the text. V rows a tile."""

    tiles: int
    """Tiles that a tower sees; 1 for a picture that is not cut."""
    source: IntArray
    """[rows] index of each into the picture's [tiles * V] features, or NEWLINE."""

    @staticmethod
    def whole(rows: int) -> PictureRows:
        """Rows of a picture that is one image with so many rows, all of which are read."""
        return PictureRows(1, np.arange(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """A picture once as a whole, squeezed into a square, then in its proportions, cut into square tiles.

    Of the tiles' features those of the padding are left out, and a newline row follows each line of the rest.
    """

    resolutions: tuple[tuple[int, int], ...]
    """(height, width) in pixels that a picture may be resized to; multiples of `tile`."""
    tile: int
    """Side of a tile in pixels, that of the tower's input."""
    side: int
    """Features along the side of a tile; V = side * side."""

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise ConfigError("the resolutions of tiles must be at least one, got none")
        for height, width in self.resolutions:
            if min(height, width) < 1 or height % self.tile or width % self.tile:
                raise ConfigError(
                    f"the resolutions of tiles must be multiples of the {self.tile} pixels of a tile, "
                    f"got {height} x {width}"
                )

    def hf_fields(self) -> dict[str, Any]:
        """Fields of preprocessor_config.json that make transformers cut the same tiles."""
        resolutions = [list(resolution) for resolution in self.resolutions]
        return {"image_processor_type": "LlavaNextImageProcessor", RESOLUTIONS: resolutions}

    def resolution(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that keeps most of a picture of this size, and of equals the one with least padding."""
        best, most, least = self.resolutions[0], 0, math.inf
        for high, wide in self.resolutions:
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            lost = high * wide - kept
            if kept > most or (kept == most and lost < least):
                best, most, least = (high, wide), kept, lost
        return best

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the picture inside `resolution`, in its proportions; the rest is padding."""
        high, wide = self.resolution(height, width)
        if wide / width < high / height:
            return min(math.ceil(height * (wide / width)), high), wide
        return high, min(math.ceil(width * (high / height)), wide)

    def rows(self, height: int, width: int) -> PictureRows:
        """Rows of a picture of this size: those of the whole picture, then line by line those of the tiles."""
        high, wide = self.resolution(height, width)
        down, across = high // self.tile, wide // self.tile
        lines, columns = self._unpadded(height, width, down * self.side, across * self.side)
        y, x = np.arange(lines.start, lines.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
        tile = 1 + y // self.side * across + x // self.side
        features = (tile * self.side + y % self.side) * self.side + x % self.side
        newlines = np.full((len(lines), 1), NEWLINE)
        grid = np.concatenate([features, newlines], axis=1).reshape(-1)
        return PictureRows(1 + down * across, np.concatenate([np.arange(self.side**2), grid]))

    @staticmethod
    def _unpadded(height: int, width: int, lines: int, columns: int) -> tuple[range, range]:
        """Lines and columns of a grid of features that are not padding, for a picture of this size."""
        if width / height > columns / lines:
            padding = (lines - int(round(height * (columns / width), 7))) // 2
            return range(padding, lines - padding), range(columns)
        padding = (columns - int(round(width * (lines / height), 7))) // 2
        return range(lines), range(padding, columns - padding)
