"""Keys and values of requests in blocks of a cache, and which rows of which requests a micro-batch runs.

The engine decides which blocks a request holds; the layers write the rows of a micro-batch into their slots and read
all rows of each request through its block table. Nothing here is read from the device.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_sys.ops import paged_attention


class PagedCache:
    """B blocks of N rows for each layer, made at the first use of a layer. For use without autograd."""

    def __init__(self, num_blocks: int, block_size: int, *, device: torch.device | str = "cpu") -> None:
        """
        Args:
            num_blocks: B.
            block_size: N.
            device: where keys and values are.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._masks: dict[str, Tensor] = {}

    def buffers(self, layer: Hashable, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, g, N, d] each.

        Args:
            layer: number of the layer, or whatever else tells apart what has keys and values.
            heads: g of this rank.
            width: d.
            dtype: of keys and values.
        """
        if layer not in self._layers:
            shape = (self.num_blocks, heads, self.block_size, width)
            # Zeros, not uninitialised: hidden rows weigh nothing, but 0 * NaN would be NaN.
            made = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
            self._layers[layer] = next(made), next(made)
        return self._layers[layer]

    def mask(self, name: str) -> Tensor:
        """bool [B, N]: rows of a kind, as whoever wants to tell them apart has set them."""
        if name not in self._masks:
            self._masks[name] = torch.zeros(self.num_blocks, self.block_size, dtype=torch.bool, device=self.device)
        return self._masks[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedRows:
    """A micro-batch of T rows of S requests, each request's one after the other, and their places in a cache."""

    cache: PagedCache
    blocks: Tensor
    """int64 [T]: block of each row ..."""
    offsets: Tensor
    """... and its place there."""
    block_tables: Tensor
    """int32 [S, W]."""
    lengths: Tensor
    """int32 [S]: rows of each request in the cache, those of the micro-batch included."""
    has_images: Tensor
    """bool [T]: whether the row's request has an image anywhere."""
    image_of_row: Tensor
    """int64 [T]: image of the batch that each row holds or reads; -1 where there is none."""
    fresh: bool
    """Whether no request has rows in the cache but these, so that keys and values are all at hand."""
    any_images: bool
    """Whether any of the requests has an image, known without asking the device."""

    def write(self, layer: Hashable, key: Tensor, value: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Writes keys and values [T, g, d] of one layer.

        Args:
            layer: see `PagedCache.buffers`.
            key, value: of all rows, or of those named.
            rows: int64, rows that they belong to.

        Returns:
            The buffers of the layer.
        """
        keys, values = self.cache.buffers(layer, key.shape[1], key.shape[2], key.dtype)
        blocks, offsets = self.blocks, self.offsets
        if rows is not None:
            blocks, offsets = blocks.index_select(0, rows), offsets.index_select(0, rows)
        keys[blocks, :, offsets] = key
        values[blocks, :, offsets] = value
        return keys, values

    def set_mask(self, name: str, rows: Tensor) -> Tensor:
        """Notes which rows are of a kind, bool [T]; returns the mask of all blocks."""
        mask = self.cache.mask(name)
        mask[self.blocks, self.offsets] = rows
        return mask

    def attend(
        self,
        query: Tensor,
        buffers: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        scale: float,
        columns: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`paged_attention` of the rows' queries [T, n, d] to what the cache holds of their requests.

        Args:
            query: rotated.
            buffers: from `write`.
            cu_seqlens: int32 [S + 1], boundaries of the requests' rows.
            max_seqlen: most rows of a request in the micro-batch.
            scale, columns, visible: see `paged_attention`.
        """
        return paged_attention(
            query,
            *buffers,
            self.block_tables,
            cu_seqlens,
            self.lengths,
            max_seqlen_q=max_seqlen,
            scale=scale,
            columns=columns,
            visible=visible,
        )
