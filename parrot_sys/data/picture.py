"""Picture: one picture as a model takes it, whole or cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_sys.towers import PictureRows


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """The images that a picture became, and the rows that it takes."""

    pixel_values: Tensor  # float32 [tiles, 3, h, w]
    rows: PictureRows | None = None
    """None: it is one image, and all of its rows are read."""


def join_pictures(pictures: Sequence[Picture]) -> tuple[Tensor | None, tuple[PictureRows, ...] | None]:
    """`pixel_values` and `pictures` of a sample with these pictures."""
    if not pictures:
        return None, None
    rows = tuple(picture.rows for picture in pictures if picture.rows is not None)
    return torch.cat([picture.pixel_values for picture in pictures]), rows or None
