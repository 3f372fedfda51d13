"""A step's samples -> packed micro-batches with the images that this rank reads.

Rows and images are known before any picture is decoded, so each picture is decoded by one rank only. Which samples turn
out to be bad is agreed on by all ranks that have them; then the others are packed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.image_files import ImageFile
from parrot_sys.data.image_share import DealtImages, Failure, ImageShare, deal_images
from parrot_sys.data.packing import Sample
from parrot_sys.errors import DataError, StorageError
from parrot_sys.towers import PictureRows

Key = tuple[int, int]
"""Sample of the step, and picture of the sample."""
FATAL = -1
"""In place of a sample: the failure is none of a sample."""


@dataclass(slots=True)
class StepDraft:
    """The samples of this rank's micro-batches, without images."""

    micro_batches: list[list[int]]
    """Samples of each, as places in `samples`."""
    samples: list[Sample] = field(default_factory=list)
    files: list[list[ImageFile]] = field(default_factory=list)
    """Pictures of each sample."""
    loaded: dict[Key, Tensor] = field(default_factory=dict)
    """[images of the picture, ...] of those that this rank has read."""
    failures: list[Failure] = field(default_factory=list)
    """Pictures that it could not read; FATAL in place of the sample where that is no fault of a sample."""
    packed: list[PackedBatch] = field(default_factory=list)
    dealt: list[DealtImages] = field(default_factory=list)
    """Of each micro-batch."""

    def add(self, reader: ImageReader, place: int, sample: Sample, files: list[ImageFile]) -> None:
        """Adds the next sample; one whose pictures have no size is a failure."""
        tiles: tuple[PictureRows, ...] | None = None
        if reader.tiles is not None and files:
            found = [reader.attempt(reader.tiles, (place, i), file) for i, file in enumerate(files)]
            if failed := [each for each in found if isinstance(each, tuple)]:
                self.failures += failed[:1]
                self.micro_batches = [[i for i in rows if i != place] for rows in self.micro_batches]
            else:
                tiles = tuple(found)
        count = len(files) if tiles is None else sum(each.tiles for each in tiles)
        self.samples.append(replace(sample, pictures=tiles, image_count=count))
        self.files.append(files)

    def keys(self, rows: Sequence[int]) -> list[Key]:
        """Pictures of a micro-batch in their order."""
        return [(i, picture) for i in rows for picture in range(len(self.files[i]))]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReader:
    """Reads the pictures of a step."""

    share: ImageShare
    read: Callable[[ImageFile, Any], Tensor]
    """A picture, and its rows where it is cut into tiles -> [images, ...]."""
    empty: Callable[[], Tensor]
    """[0, ...]"""
    name: str
    """Field of PackedBatch that holds what `read` gives."""
    describe: Callable[[int], str]
    """Place of a sample, for messages."""
    pack: Callable[[Sequence[Sample]], PackedBatch]
    tiles: Callable[[ImageFile], PictureRows] | None = None
    """Rows of a picture from its size; None where pictures are not cut into tiles."""
    join: Callable[[list[Tensor]], Tensor] = torch.cat
    """Images of several pictures as one tensor."""
    skips_bad: bool = False
    """Leave out samples whose pictures cannot be read; otherwise they are an error, on all ranks."""

    def read_own(self, draft: StepDraft, run: Callable[..., Iterable[Any]]) -> None:
        """Packs the micro-batches, and reads what this rank has to of their pictures, as far as it has not.

        Args:
            draft: the step.
            run: `map` of a pool of threads.
        """
        draft.packed = [self.pack([draft.samples[i] for i in rows]) for rows in draft.micro_batches]
        draft.dealt = [self._deal(draft, *pair) for pair in zip(draft.micro_batches, draft.packed, strict=True)]
        wanted: dict[Key, None] = {}
        for rows, dealt in zip(draft.micro_batches, draft.dealt, strict=True):
            keys = draft.keys(rows)
            wanted |= dict.fromkeys(keys[picture] for picture, _, _ in dealt.parts)
            wanted |= dict.fromkeys(keys[picture] for picture in dealt.checked)
        missing = [key for key in wanted if key not in draft.loaded]

        def read(key: Key) -> Any:
            rows = draft.samples[key[0]].pictures
            return self.attempt(self.read, key, draft.files[key[0]][key[1]], None if rows is None else rows[key[1]])

        for key, result in zip(missing, run(read, missing), strict=True):
            if isinstance(result, Tensor):
                draft.loaded[key] = result
            else:
                draft.failures.append(result)

    def finish(self, draft: StepDraft, run: Callable[..., Iterable[Any]]) -> tuple[list[PackedBatch], dict[int, str]]:
        """The micro-batches, and sample -> reason of those that were left out. Every rank with these samples calls it.

        Raises:
            DataError: a picture cannot be read, on any of the ranks, and bad samples are not skipped.
            StorageError: a file that holds many samples is at fault, on any of the ranks.
        """
        failures = self.share.agree(draft.failures)
        bad: dict[int, str] = {}
        for sample, _, reason in sorted(failures):
            bad.setdefault(sample, reason)
        if FATAL in bad:
            raise StorageError(bad[FATAL])
        if bad and not self.skips_bad:
            raise DataError(next(iter(bad.values())))
        if bad:
            draft.micro_batches = [[i for i in rows if i not in bad] for rows in draft.micro_batches]
            draft.failures = []
            self.read_own(draft, run)
            if draft.failures:  # another rank has read it a moment ago
                raise StorageError(draft.failures[0][2])
        batches = [self._with_images(draft, number) for number in range(len(draft.packed))]
        draft.loaded.clear()  # (megabytes: whoever takes the step must not wait until they are freed)
        return batches, bad

    def attempt(self, action: Callable[..., Any], key: Key, *arguments: Any) -> Any:
        """The result of an action on a picture, or how it failed."""
        try:
            return action(*arguments)
        except StorageError as error:
            return FATAL, key[1], str(error)
        except DataError as error:
            return *key, f"{self.describe(key[0])}: {error}"

    def _with_images(self, draft: StepDraft, number: int) -> PackedBatch:
        batch, dealt, keys = draft.packed[number], draft.dealt[number], draft.keys(draft.micro_batches[number])
        parts = [draft.loaded[keys[picture]][first:end] for picture, first, end in dealt.parts]
        changes: dict[str, Any] = {} if self.share.is_whole else {"dealt_images": dealt.counts}
        if sum(dealt.counts):
            changes[self.name] = self.join(parts) if parts else self.empty()
        return replace(batch, **changes)

    def _deal(self, draft: StepDraft, rows: Sequence[int], batch: PackedBatch) -> DealtImages:
        left = np.bincount(batch.image_sample.numpy(), minlength=len(rows)).tolist()
        kept = []
        for images, i in zip(left, rows, strict=True):
            tiles = draft.samples[i].pictures
            for picture in range(len(draft.files[i])):
                own = min(images, 1 if tiles is None else tiles[picture].tiles)
                kept.append(own)
                images -= own
        return deal_images(kept, self.share)
