"""Requests in a paged cache, for tests of models without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.attention.paged import PagedCache, PagedRows
from parrot_sys.megatron.model import MultimodalModel


class Pages:
    """Requests that each have blocks of their own, in no order."""

    def __init__(self, num_requests: int, capacity: int, *, block_size: int = 3) -> None:
        width = -(-capacity // block_size)
        order = torch.randperm(num_requests * width, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(num_requests, width).int()
        self.lengths = torch.zeros(num_requests, dtype=torch.int64)
        self.has_images = torch.zeros(num_requests, dtype=torch.bool)
        self._cache = PagedCache(num_requests * width, block_size)

    def keep(self, requests: Sequence[int]) -> None:
        """Only these requests go on."""
        kept = list(requests)
        self.tables, self.lengths, self.has_images = self.tables[kept], self.lengths[kept], self.has_images[kept]

    def rows(self, counts: Sequence[int], images: Tensor | None = None) -> PagedRows:
        """The next rows of each request, which then count; `images` [T]: that each row holds or reads, -1 without."""
        own = torch.tensor(counts)
        request = torch.repeat_interleave(own)
        starts = (own.cumsum(0) - own)[request]
        position = self.lengths[request] + torch.arange(len(request)) - starts
        fresh = not bool(self.lengths.any())
        self.lengths = self.lengths + own
        size = self._cache.block_size
        return PagedRows(
            cache=self._cache,
            blocks=self.tables[request, position // size].long(),
            offsets=position % size,
            block_tables=self.tables,
            lengths=self.lengths.int(),
            has_images=self.has_images[request],
            image_of_row=torch.full_like(request, -1) if images is None else images,
            fresh=fresh,
            any_images=bool(self.has_images.any()),
        )


def prompts(model: MultimodalModel, batch: PackedBatch, steps: int) -> tuple[Pages, PackedBatch, PagedRows]:
    """A batch as the first rows of requests that go on for some steps, with its images encoded."""
    pages = Pages(batch.num_samples, batch.max_seqlen + steps)
    pages.has_images[batch.image_sample] = True
    if batch.num_images:
        rows, _ = model.bridge.encode_images(model.decoder, batch, [len(batch.visual_source)], None)
        source = torch.arange(len(batch.visual_source))
        batch = replace(batch, pixel_values=None, image_features=None, image_rows=rows[0], visual_source=source)
    return pages, batch, pages.rows(batch.cu_seqlens.diff().tolist())


def step_batch(tokens: Tensor, positions: Tensor) -> PackedBatch:
    """One row of each request."""
    return replace(
        PackedBatch.empty(),
        input_ids=tokens,
        position_ids=positions,
        cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32),
        max_seqlen=1,
    )
