"""Features of pictures by digest, so that a new prompt about a known picture does not run the tower again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pixels_digest(pixels: Tensor) -> bytes:
    """Digest of preprocessed pixels: of their shape, dtype and bytes."""
    whole = pixels.detach().contiguous().cpu()
    digest = hashlib.blake2b(f"{tuple(whole.shape)} {whole.dtype}".encode(), digest_size=16)
    digest.update(whole.view(torch.uint8).numpy())
    return digest.digest()


class FeatureCache:
    """The features that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: of all features; 0 keeps none.
        """
        self.max_bytes = max_bytes
        self.encoded = 0
        """Pictures that the tower was run on."""
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    def features(self, pictures: Sequence[Tensor], tower: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """[V, C] of each picture [3, h, w]; the tower runs once, on those that are not held, each taken once."""
        digests = [pixels_digest(picture) for picture in pictures]
        found = {digest: self._held[digest] for digest in digests if digest in self._held}
        missing = {digest: picture for digest, picture in zip(digests, pictures, strict=True) if digest not in found}
        if missing:
            encoded = tower(torch.stack(list(missing.values())))
            self.encoded += len(missing)
            found |= dict(zip(missing, (rows.clone() for rows in encoded), strict=True))
        for digest in dict.fromkeys(digests):
            self._keep(digest, found[digest])
        return [found[digest] for digest in digests]

    def _keep(self, digest: bytes, rows: Tensor) -> None:
        if digest not in self._held:
            self._bytes += rows.nbytes
            self._held[digest] = rows
        self._held.move_to_end(digest)
        while self._bytes > self.max_bytes:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= dropped.nbytes
