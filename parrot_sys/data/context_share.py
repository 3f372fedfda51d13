"""The share of a micro-batch that one rank of a context-parallel group works on; all of them see the whole."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from parrot_sys.data.batch import ContextShare, PackedBatch
from parrot_sys.parallel import RowSplit, split_counts


def share_of_rank(batch: PackedBatch, rank: int, size: int, *, multiple_of: int = 1) -> PackedBatch:
    """The micro-batch with the label rows and the images of one rank only.

    All else stays: every rank needs the ids of the whole pack, for the text that guides its images. Each label row and
    each image belongs to exactly one rank, so that losses and counts of the ranks add up. To be called while the batch
    is on the CPU: how many label rows a rank has follows from their values.

    Args:
        batch: micro-batch, the same on every rank of the group.
        rank: this rank's number in the group.
        size: ranks of the group.
        multiple_of: of how many rows each rank must hold a multiple (sequence parallelism cuts them again).
    """
    split = RowSplit.of(batch.num_rows, size, multiple_of=multiple_of)
    image_counts = split_counts(batch.num_images, size)
    first = sum(image_counts[:rank])
    mine = slice(first, first + image_counts[rank])

    def own(images: Tensor | None) -> Tensor | None:
        if images is None or batch.dealt_images is not None:  # (the loader has read no others)
            return images
        return images[mine] if image_counts[rank] else None

    return dataclasses.replace(
        batch,
        label_rows=batch.label_rows[split.owner(batch.label_rows) == rank],
        guidance_start=batch.guidance_start[mine],
        guidance_end=batch.guidance_end[mine],
        image_sample=batch.image_sample[mine],
        pixel_values=own(batch.pixel_values),
        image_features=own(batch.image_features),
        context=ContextShare(rank=rank, rows=split, image_counts=tuple(image_counts)),
    )
