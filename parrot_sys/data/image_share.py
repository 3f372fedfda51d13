"""ImageShare: which images of a micro-batch a rank reads, where several ranks have the same samples.

Only the first pipeline stage reads images. Its context-parallel ranks take the images that they embed, and the
tensor-parallel ranks, which all need those, read a part each and gather them later (`megatron.image_gather`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from parrot_sys.parallel import split_counts

Failure = tuple[int, int, str]
"""Sample of the step, picture of the sample, and why it cannot be read."""


def _alone(failures: list[Failure]) -> list[Failure]:
    return failures


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageShare:
    """The place of a rank among those that have the same samples."""

    needed: bool = True
    """Whether the modules of this rank read images."""
    context: tuple[int, int] = (0, 1)
    """Rank and size of its context-parallel group."""
    tensor: tuple[int, int] = (0, 1)
    """Rank and size of its tensor-parallel group."""
    agree: Callable[[list[Failure]], list[Failure]] = _alone
    """The lists of all ranks that have the same samples, joined; every one of them calls it in every step."""

    @property
    def is_alone(self) -> bool:
        """Whether no other rank has the same samples."""
        return self.agree is _alone

    @property
    def is_whole(self) -> bool:
        """Whether this rank reads all images itself."""
        return self.needed and self.context[1] == self.tensor[1] == 1


@dataclass(frozen=True, slots=True)
class DealtImages:
    """The images that one rank reads of a micro-batch."""

    parts: tuple[tuple[int, int, int], ...]
    """(picture, first of its images, one past the last), in order; a picture that is cut into tiles has several."""
    checked: tuple[int, ...]
    """Pictures that truncation removed: they are only looked at, since a broken one makes its sample a bad one."""
    counts: tuple[int, ...]
    """Images that each rank of the tensor-parallel group reads."""


def deal_images(kept: Sequence[int], share: ImageShare) -> DealtImages:
    """
    Args:
        kept: images of each picture of the micro-batch that still have rows.
        share: of the rank.
    """
    if not share.needed:
        return DealtImages((), (), ())
    (context, contexts), (tensor, tensors) = share.context, share.tensor
    ends = np.cumsum(kept, dtype=np.int64).tolist()
    before = [end - count for end, count in zip(ends, kept, strict=True)]
    counts = split_counts(ends[-1] if ends else 0, contexts)
    start = sum(counts[:context])
    stop = start + counts[context]
    own = [
        (picture, max(start, first) - first, min(stop, end) - first)
        for picture, (first, end) in enumerate(zip(before, ends, strict=True))
        if max(start, first) < min(stop, end)
    ]
    sizes = split_counts(len(own), tensors)
    bounds = np.cumsum([0, *sizes]).tolist()
    parts = [own[a:b] for a, b in itertools.pairwise(bounds)]
    removed = [picture for picture, count in enumerate(kept) if not count]
    return DealtImages(
        tuple(parts[tensor]),
        tuple(removed[context * tensors + tensor :: contexts * tensors]),
        tuple(sum(end - first for _, first, end in part) for part in parts),
    )
