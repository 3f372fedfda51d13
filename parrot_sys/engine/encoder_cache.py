"""Results of the encoders of pictures, kept for requests that bring them again: tower features, and rows after routing.

Tower features follow from the picture alone. What the decoder gets of it may follow from the prompt as well (Parrot's
experts), so it is kept by picture and guidance. Both have digests of contents, never names: two pictures of equal bytes
and different sizes are two pictures.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from parrot_sys.engine.blocks import digest
from parrot_sys.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)


def pixels_digest(pixels: Tensor) -> bytes:
    """Identity of a picture as the tower gets it, [k, 3, h, w], or of its features: dtype, shape and values.

    Pixels are taken after everything that is done to a file (EXIF, transparency, padding, resizing, tiles), so pictures
    of other modes or sizes differ as soon as the model could tell, and it does not matter how their files are written.
    """
    shape = struct.pack(f"<{pixels.dim()}q", *pixels.shape)
    values = pixels.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return digest(str(pixels.dtype).encode(), shape, values.tobytes())


@dataclass(kw_only=True, slots=True)
class CacheCounts:
    """Events since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class TensorCache(Generic[Key]):
    """Tuples of tensors by key, at most so many bytes; those that were used longest ago leave first."""

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: bytes of all tensors together; 0 keeps nothing.

        Raises:
            ConfigError: it is negative.
        """
        if max_bytes < 0:
            raise ConfigError(f"bytes of a cache must be >= 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.counts = CacheCounts()
        self._values: OrderedDict[Key, tuple[Tensor, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> tuple[Tensor, ...] | None:
        """The tensors of a key, which count as used now; None without them."""
        value = self._values.get(key)
        if value is None:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: tuple[Tensor, ...]) -> None:
        """Keeps tensors, unless they alone are larger than the cache. Views are copied, or they would keep all of what
        they are views of."""
        self._remove(key)
        size = _num_bytes(value)
        if size > self.max_bytes:
            return
        while self.num_bytes + size > self.max_bytes:
            self._remove(next(iter(self._values)))
            self.counts.evictions += 1
        own = tuple(part if part.untyped_storage().nbytes() == _num_bytes((part,)) else part.clone() for part in value)
        self._values[key] = own
        self.num_bytes += size

    def clear(self) -> None:
        """Forgets everything, as new weights need it."""
        self._values.clear()
        self.num_bytes = 0

    def _remove(self, key: Key) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self.num_bytes -= _num_bytes(value)


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(part.numel() * part.element_size() for part in tensors)


class EncoderCache:
    """The two caches of pictures, and how often the tower ran."""

    def __init__(self, *, feature_bytes: int, routed_bytes: int) -> None:
        """
        Args:
            feature_bytes: of tower features.
            routed_bytes: of rows after routing.
        """
        self.features: TensorCache[bytes] = TensorCache(feature_bytes)
        """Picture -> features [V, C]."""
        self.routed: TensorCache[tuple[bytes, bytes]] = TensorCache(routed_bytes)
        """Picture and guidance -> rows [V, H] and what the router decided, if there is one."""
        self.pictures_encoded = 0
        """Pictures that the tower was run on."""

    def clear(self) -> None:
        """Forgets everything, as new weights need it."""
        self.features.clear()
        self.routed.clear()
