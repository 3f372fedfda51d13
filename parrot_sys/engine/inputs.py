"""Inputs of a step for the model: rows of many requests, one after the other, and where they are in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parrot_sys.engine.requests import RequestImage
from parrot_sys.engine.scheduler import Chunk, ScheduledRequest

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step: T rows of S requests, n images that some of them hold or read, K rows whose logits are wanted.

    On the CPU, int64 all but `image_rows`, so that it can be sent to other ranks as two tensors.
    """

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    bounds: Tensor  # [S + 1], rows of each request
    lengths: Tensor  # [S], rows of each request in the cache after the step
    block_tables: Tensor  # [S * W]
    has_images: Tensor  # [S], 1 where the request has an image anywhere
    logits_rows: Tensor  # [K]
    visual_rows: Tensor  # [R], rows that hold images
    visual_source: Tensor  # [R], their rows in `image_rows`
    image_of_row: Tensor  # [T], image that each row holds or reads, -1 without
    image_sample: Tensor  # [n], request of each image
    image_rows: Tensor | None = None  # [n * V, W]

    @staticmethod
    def integer_fields() -> tuple[str, ...]:
        """Names of the fields with integers, in their order."""
        return tuple(field.name for field in fields(StepInputs) if field.name != "image_rows")


def build_step(chunks: Sequence[Chunk], images_of: Sequence[Sequence[RequestImage]], block_size: int) -> StepInputs:
    """Inputs of the chunks of a step.

    Args:
        chunks: at least one.
        images_of: images of each chunk's request; those that its rows hold or read are encoded.
        block_size: rows of a block.
    """
    counts = np.array([chunk.stop - chunk.start for chunk in chunks])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    ids = np.concatenate([np.array(chunk.request.ids[chunk.start : chunk.stop]) for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    offsets = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - starts, counts)
    width = max(-(-chunk.stop // block_size) for chunk in chunks)
    tables = np.zeros((len(chunks), width), dtype=np.int64)
    for table, chunk in zip(tables, chunks, strict=True):
        used = -(-chunk.stop // block_size)
        table[:used] = chunk.request.blocks[:used]
    wanted = [
        np.arange(rows.start, rows.stop) - chunk.start + start
        for chunk, start in zip(chunks, bounds, strict=False)
        if len(rows := chunk.logits_rows)
    ]
    seen = _Seen(bounds[-1])
    for index, (chunk, images) in enumerate(zip(chunks, images_of, strict=True)):
        for image in images:
            seen.add(index, chunk, int(bounds[index]), image)
    return StepInputs(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(offsets),
        bounds=torch.from_numpy(bounds),
        lengths=torch.tensor([chunk.stop for chunk in chunks]),
        block_tables=torch.from_numpy(tables.ravel()),
        has_images=torch.tensor([int(bool(images)) for images in images_of]),
        logits_rows=torch.from_numpy(_joined(wanted)),
        **seen.fields(),
    )


class StepBuilder:
    """Inputs of one step after the other; one with the same answers as the step before takes over what stays."""

    def __init__(self, block_size: int) -> None:
        """
        Args:
            block_size: rows of a block.
        """
        self._block_size = block_size
        self._last: StepInputs | None = None
        self._tables = np.empty((0, 0), dtype=np.int64)  # [S, W], W with room for the answers to grow
        self._requests: list[tuple[ScheduledRequest, int]] = []
        """Requests of the last step, if each had one row and read no picture with it; and how often each was admitted,
        since one that was preempted or rested comes back with other blocks."""

    def build(self, chunks: Sequence[Chunk], images_of: Sequence[Sequence[RequestImage]]) -> StepInputs:
        """See `build_step`."""
        requests = [(chunk.request, chunk.request.admissions) for chunk in chunks]
        single = all(chunk.stop - chunk.start == len(chunk.logits_rows) == 1 for chunk in chunks)
        single = single and not any(
            image.readers.stop > chunk.start
            for chunk, images in zip(chunks, images_of, strict=True)
            for image in images
        )
        if single and self._last is not None and requests == self._requests:
            inputs = self._next(self._last, chunks)
        else:
            inputs = build_step(chunks, images_of, self._block_size)
            self._requests = requests if single else []
            self._tables = inputs.block_tables.view(len(chunks), -1).numpy()
        self._last = inputs
        return inputs

    def _next(self, last: StepInputs, chunks: Sequence[Chunk]) -> StepInputs:
        size = self._block_size
        width = max((chunk.stop - 1) // size for chunk in chunks) + 1
        if width > self._tables.shape[1]:
            self._tables = np.pad(self._tables, ((0, 0), (0, width)))
        for table, chunk in zip(self._tables, chunks, strict=True):
            if chunk.start % size == 0:
                table[chunk.start // size] = chunk.request.blocks[-1]
        return replace(
            last,
            input_ids=torch.tensor([chunk.request.ids[-1] for chunk in chunks]),
            position_ids=last.position_ids + 1,
            lengths=last.lengths + 1,
            block_tables=torch.from_numpy(self._tables[:, :width].copy().ravel()),
        )


class _Seen:
    """Images that the rows of a step hold or read."""

    def __init__(self, num_rows: int) -> None:
        self._image_of_row = np.full(num_rows, -1, dtype=np.int64)
        self._rows: list[Integers] = []
        self._source: list[Integers] = []
        self._sample: list[int] = []
        self._values: list[Tensor] = []
        self._num_values = 0

    def add(self, index: int, chunk: Chunk, begin: int, image: RequestImage) -> None:
        """An image of the chunk that is number `index` and whose rows begin at `begin`; left out where none sees it."""
        start, stop = max(image.readers.start, chunk.start), min(image.readers.stop, chunk.stop)
        if start >= stop:
            return
        assert image.rows is not None, "images are encoded before the step that reads them"
        shift = begin - chunk.start
        self._image_of_row[start + shift : stop + shift] = len(self._sample)
        held = range(max(image.place.start, chunk.start), min(image.place.stop, chunk.stop))
        if len(held):
            self._rows.append(np.arange(held.start, held.stop) + shift)
            self._source.append(np.arange(held.start, held.stop) - image.place.start + self._num_values)
        self._sample.append(index)
        self._values.append(image.rows)
        self._num_values += len(image.rows)

    def fields(self) -> dict[str, Tensor]:
        """Fields of `StepInputs`."""
        values = {"image_rows": torch.cat(self._values)} if self._values else {}
        return values | {
            "visual_rows": torch.from_numpy(_joined(self._rows)),
            "visual_source": torch.from_numpy(_joined(self._source)),
            "image_of_row": torch.from_numpy(self._image_of_row),
            "image_sample": torch.tensor(self._sample, dtype=torch.int64),
        }


def _joined(parts: Sequence[Integers]) -> Integers:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
