"""Features of pictures by digest, so that a new prompt about a known picture does not run the tower again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parrot_sys.engine.encoder_cache import TensorCache, pixels_digest


class FeatureCache:
    """The features that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: of all features; 0 keeps none.
        """
        self.encoded = 0
        """Pictures that the tower was run on."""
        self._held: TensorCache[bytes] = TensorCache(max_bytes)

    def features(self, pictures: Sequence[Tensor], tower: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """[V, C] of each picture [3, h, w]; the tower runs once, on those that are not held, each taken once."""
        digests = [pixels_digest(picture) for picture in pictures]
        found = {digest: held[0] for digest in dict.fromkeys(digests) if (held := self._held.get(digest)) is not None}
        missing = {digest: picture for digest, picture in zip(digests, pictures, strict=True) if digest not in found}
        if missing:
            self.encoded += len(missing)
            for digest, rows in zip(missing, tower(torch.stack(list(missing.values()))), strict=True):
                found[digest] = rows
                self._held.put(digest, (rows,))
        return [found[digest] for digest in digests]
