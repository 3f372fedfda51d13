"""Configuration of LLaVA: the tiles that pictures are cut into, and the token that stands for a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from parrot_sys.errors import ConfigError
from parrot_sys.systems.section import ModelSettings, Section
from parrot_sys.towers import Tiling, VisionConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class LlavaConfig(Section):
    """LLaVA-NeXT; without `grids` LLaVA-1.5, in which a picture is one image."""

    key: ClassVar[str] = "llava"

    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    """Grids of tiles that a picture may be cut into, as rows and columns; each picture gets the one that keeps most of
    it, and is seen once more as a whole. None at all: a picture stays whole."""
    image_token_id: int | None = None
    """Token of the vocabulary that stands for a picture in prompts of transformers (image_token_index)."""

    def __post_init__(self) -> None:
        for rows, columns in self.grids:
            if min(rows, columns) < 1:
                raise ConfigError(f"model.llava.grids must be pairs of numbers >= 1, got {rows} x {columns}")

    def check(self, model: ModelSettings) -> None:
        """Checks the tiles against the tower, and the projector and the token against the released layout.

        Raises:
            ConfigError: tiles of a tower that adds a row, another projector, a token beyond the vocabulary.
        """
        if self.grids and model.vision.select_feature != "patch":
            raise ConfigError(
                "model.vision.select_feature must be patch with model.llava.grids, whose lines have no place for the "
                f"CLS row, got {model.vision.select_feature}"
            )
        if model.projector.type != "mlp2x_gelu":
            raise ConfigError(f"model.projector.type must be mlp2x_gelu with model.llava, got {model.projector.type!r}")
        token, size = self.image_token_id, model.llm.vocab_size
        if token is not None and not 0 <= token < size:
            raise ConfigError(
                f"model.llava.image_token_id must be in 0 .. {size - 1} (model.llm.vocab_size={size}), got {token}"
            )

    def tiling(self, vision: VisionConfig) -> Tiling | None:
        """Tiles and rows of pictures; None where they stay whole."""
        if not self.grids:
            return None
        tile = vision.image_size
        return Tiling(
            resolutions=tuple((rows * tile, columns * tile) for rows, columns in self.grids),
            tile=tile,
            side=math.isqrt(vision.num_patches),
        )
