"""PackedBatch: what crosses from the data loader to the model. See docs/architecture.md for the table of fields."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parrot_sys.parallel import RowSplit


def pinned_cat(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` into page-locked memory, with no other copy."""
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    return torch.cat(list(tensors), out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True))


@lru_cache(maxsize=4096)
def language_number(name: str) -> int:
    """A number below 2^52, which float64 holds exactly, for any name of a language; -1 for none."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 12 if name else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """Which part of a micro-batch a rank of context parallelism works on; see `data.context_share`."""

    rank: int
    """Number of the rank in its group."""
    rows: RowSplit
    """How the rows of the pack are dealt over the ranks."""
    image_counts: tuple[int, ...]
    """Images of each rank, in the order of the whole micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One packed micro-batch. T rows, S samples, n images, V visual rows an image, G guidance rows, L label rows.

    Shapes and dtypes: docs/architecture.md. At most one of `pixel_values` and `image_features` is set, none when n = 0.
    With `context` set, label rows and images are those of one rank, and `visual_source` counts the images of all ranks.
    With `dealt_images` set, pixels or features are a part of them until `gather_images` has joined the parts.
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, already shifted
    label_rows: Tensor  # [L] int64
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    visual_rows: Tensor  # [R] int64
    visual_source: Tensor  # [R] int64
    guidance_rows: Tensor  # [G] int64
    guidance_start: Tensor  # [n] int32
    guidance_end: Tensor  # [n] int32
    image_sample: Tensor  # [n] int64
    pixel_values: Tensor | None = None  # [n, 3, h, w]
    image_features: Tensor | None = None  # [n, V, C]
    image_rows: Tensor | None = None  # [rows, W], what the decoder gets of the images, where that is known already
    languages: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    record_ids: tuple[str, ...] = ()
    context: ContextShare | None = None
    dealt_images: tuple[int, ...] | None = None
    """Images, of those of this context-parallel rank, that each tensor-parallel rank has read; () where the rank needs
    none of them; None where the batch has them all."""

    @property
    def num_samples(self) -> int:
        """S, samples in the batch."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_images(self) -> int:
        """n, images of all samples."""
        return self.image_sample.numel()

    @property
    def num_rows(self) -> int:
        """T, text and visual rows."""
        return self.input_ids.numel()

    def image_languages(self) -> Tensor:
        """[n] int64 on the device of the batch: a number for the language of each image, the same on every rank and in
        every run; -1 where it is not known."""
        numbers = torch.tensor([language_number(name) for name in self.languages], dtype=torch.int64)
        if not self.languages:
            numbers = torch.full((self.num_samples,), -1)
        return numbers.to(self.image_sample.device)[self.image_sample]

    def pinned(self) -> PackedBatch:
        """The same batch in page-locked memory, from which `to` copies to a GPU beside the work of both."""
        return self._mapped(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(each) for name, each in tensors.items() if isinstance(each, Tensor)}
        return dataclasses.replace(self, **changed)

    @staticmethod
    def empty() -> PackedBatch:
        """A micro-batch without samples: a rank with nothing to do still runs the same collectives."""
        rows = torch.empty(0, dtype=torch.int64)
        span = torch.empty(0, dtype=torch.int32)
        return PackedBatch(
            input_ids=rows,
            labels=rows,
            label_rows=rows,
            position_ids=rows,
            cu_seqlens=torch.zeros(1, dtype=torch.int32),
            max_seqlen=0,
            visual_rows=rows,
            visual_source=rows,
            guidance_rows=rows,
            guidance_start=span,
            guidance_end=span,
            image_sample=rows,
        )
