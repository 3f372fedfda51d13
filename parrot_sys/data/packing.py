"""Packing: samples -> PackedBatch, and a global batch -> micro-batches of every data-parallel rank.

Rows, shifts and truncation follow AIDC-AI/Parrot, parrot/model/parrot_arch.py (prepare_inputs_labels_for_multimodal)
and the collator in parrot/train/data.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parrot_kernels.host import first_fit_decreasing
from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.errors import DataError
from parrot_sys.towers import NEWLINE, PictureRows

IntArray = npt.NDArray[np.int64]
Guidance = Literal["prompt", "first_turn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One tokenised conversation with its images."""

    input_ids: Any
    """int64 [N] (list, array or tensor); IMAGE_TOKEN_ID once for each picture."""
    labels: Any = None
    """int64 [N], not shifted; None: no row bears loss, as at inference."""
    first_answer: int | None = None
    """Without labels: index in `input_ids` where the first answer begins; None: none has begun."""
    pixel_values: Tensor | None = None
    """float32 [k, 3, h, w] of its k images (pictures, or tiles of pictures one picture after the other), or ..."""
    image_features: Tensor | None = None
    """... float32 [k, V, C], outputs of the frozen tower."""
    image_count: int = 0
    """k, where neither of them is at hand yet."""
    pictures: tuple[PictureRows, ...] | None = None
    """Rows of each picture that is cut into tiles; None: each picture is one image, and all of its rows are read."""
    language: str = ""
    category: str = ""
    """Of what its images show, as far as a record states it."""
    record_id: str = ""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A sample after its image markers became rows and it was cut: N rows, k images of pictures that still have one."""

    input_ids: IntArray  # [N]
    labels: IntArray  # [N], not shifted
    image_source: IntArray  # [R] of each image row: image of the sample * V + row of the image, or NEWLINE
    num_images: int
    first_answer: int  # row where the first answer begins, N or more when there is none


def rows_of_pictures(sample: Sample, num_visual_rows: int) -> int | IntArray:
    """Rows of every picture of a sample, or of each in turn, for the functions below."""
    if sample.pictures is None:
        return num_visual_rows
    return np.array([len(picture.source) for picture in sample.pictures], dtype=np.int64)


def _rows_of_ids(input_ids: IntArray, picture_rows: int | IntArray) -> IntArray:
    """Rows that each of the ids [N] becomes; the first N when `picture_rows` names more pictures."""
    is_image = input_ids == IMAGE_TOKEN_ID
    repeats = np.ones(len(input_ids), dtype=np.int64)
    repeats[is_image] = picture_rows if isinstance(picture_rows, int) else picture_rows[: np.count_nonzero(is_image)]
    return repeats


def expanded_lengths(input_ids: IntArray, picture_rows: int | IntArray, max_seq_len: int) -> tuple[int, int]:
    """(rows after expansion and truncation, rows without truncation) of unexpanded ids [N].

    `picture_rows` are the rows of every picture, or of each in turn.
    """
    repeats = _rows_of_ids(input_ids, picture_rows)
    return min(int(repeats[:max_seq_len].sum()), max_seq_len), int(repeats.sum())


def remaining_labels(input_ids: IntArray, labels: IntArray, picture_rows: int | IntArray, max_seq_len: int) -> int:
    """Number of rows of a sample that bear loss after expansion and truncation; unexpanded ids and labels [N]."""
    ids, labels = input_ids[:max_seq_len], labels[:max_seq_len]
    repeats = _rows_of_ids(ids, picture_rows)
    rows = np.cumsum(repeats) - repeats
    return int(np.count_nonzero((labels != IGNORE_ID) & (rows < max_seq_len) & (rows > 0)))


def pack_samples(
    samples: Sequence[Sample],
    *,
    num_visual_rows: int,
    guidance: Guidance = "prompt",
    max_seq_len: int | None = None,
) -> PackedBatch:
    """Packs samples one after the other.

    Args:
        samples: at least one id each; all with pixel values or all with image features, as far as they have images.
        num_visual_rows: V, rows of an image (of a tile, where pictures are cut into some) among those of the text; 1
            where text reads its features from elsewhere.
        guidance: which text rows guide the routing of a sample's images: `prompt` takes every row without a label,
            `first_turn` only those before the first answer (its first label, or `first_answer` without labels). Rows
            that truncation removed guide nothing.
        max_seq_len: cut each sample to so many ids before expansion and to so many rows after it, as the released code
            does; pictures that lose all their rows are left out. None cuts nothing.

    Raises:
        DataError: a sample without ids, or whose images do not match its markers.
    """
    if not samples:
        return PackedBatch.empty()
    rows = [_expand(sample, num_visual_rows, max_seq_len) for sample in samples]
    lengths = np.array([len(row.input_ids) for row in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    images = np.array([row.num_images for row in rows])
    input_ids = np.concatenate([row.input_ids for row in rows])
    labels = np.concatenate([_shift(row.labels) for row in rows])
    guides = [_guidance_rows(row, guidance) for row in rows]
    guidance_ends = np.cumsum([len(each) for each in guides])
    guidance_starts = guidance_ends - np.array([len(each) for each in guides])
    pixel_values = _join([sample.pixel_values for sample in samples], images)
    image_features = _join([sample.image_features for sample in samples], images)
    if pixel_values is not None and image_features is not None:
        raise DataError("all samples of a micro-batch must have pixel_values or all image_features, got both kinds")
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        label_rows=torch.from_numpy(np.flatnonzero(labels != IGNORE_ID)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        visual_rows=torch.from_numpy(np.flatnonzero(input_ids == IMAGE_TOKEN_ID)),
        visual_source=torch.from_numpy(_visual_source(rows, num_visual_rows)),
        guidance_rows=torch.from_numpy(np.concatenate([g + s for g, s in zip(guides, starts[:-1], strict=True)])),
        guidance_start=torch.from_numpy(np.repeat(guidance_starts, images).astype(np.int32)),
        guidance_end=torch.from_numpy(np.repeat(guidance_ends, images).astype(np.int32)),
        image_sample=torch.from_numpy(np.repeat(np.arange(len(samples)), images)),
        pixel_values=pixel_values,
        image_features=image_features,
        languages=tuple(sample.language for sample in samples),
        categories=tuple(sample.category for sample in samples),
        record_ids=tuple(sample.record_id for sample in samples),
    )


def _visual_source(rows: Sequence[_Rows], num_visual_rows: int) -> IntArray:
    """[R] feature of each image row, of those of all images one after the other; the newline row comes after them."""
    first = np.cumsum([0, *(num_visual_rows * row.num_images for row in rows)])
    sources = [
        np.where(row.image_source == NEWLINE, first[-1], row.image_source + start)
        for row, start in zip(rows, first[:-1], strict=True)
    ]
    return np.concatenate(sources)


def plan_micro_batches(lengths: Sequence[int] | IntArray, capacity: int, dp_size: int) -> list[list[list[int]]]:
    """Splits a global batch into micro-batches of at most `capacity` rows, the same number for every rank.

    First-fit decreasing decides how many micro-batches a rank needs; the smallest capacity that needs no more then
    spreads the rows evenly. Bins are dealt to the ranks by falling size, back and forth, so that ranks get about as
    many rows.

    Args:
        lengths: rows of each sample of the global batch.
        capacity: most rows in a micro-batch.
        dp_size: data-parallel ranks.

    Returns:
        For each rank its micro-batches, as lists of indices into `lengths`; some may be empty.

    Raises:
        ValueError: a sample is longer than the capacity.
    """
    rows = np.array(lengths, dtype=np.int64)
    bins = first_fit_decreasing(rows, capacity)
    per_rank = max(1, -(-len(bins) // dp_size))
    bins = _spread_evenly(rows, bins, capacity, per_rank * dp_size)
    bins.sort(key=lambda each: -int(rows[each].sum()))  # stable: equal sizes keep their order
    bins += [[] for _ in range(per_rank * dp_size - len(bins))]
    rounds = [bins[i : i + dp_size] for i in range(0, len(bins), dp_size)]
    return [
        [each[rank if i % 2 == 0 else dp_size - 1 - rank] for i, each in enumerate(rounds)] for rank in range(dp_size)
    ]


def _spread_evenly(rows: IntArray, bins: list[list[int]], capacity: int, count: int) -> list[list[int]]:
    """The packing into at most `count` bins with the smallest capacity that bisection finds."""
    low, high = max(int(rows.max(initial=0)), -(-int(rows.sum()) // count)), capacity
    while low < high:
        middle = (low + high) // 2
        smaller = first_fit_decreasing(rows, middle)
        if len(smaller) <= count:
            bins, high = smaller, middle
        else:
            low = middle + 1
    return bins


def _expand(sample: Sample, num_visual_rows: int, max_seq_len: int | None) -> _Rows:
    ids = np.asarray(sample.input_ids, dtype=np.int64)
    labels = np.full_like(ids, IGNORE_ID) if sample.labels is None else np.asarray(sample.labels, dtype=np.int64)
    if not len(ids) or ids.shape != labels.shape:
        raise DataError(
            f"sample {sample.record_id!r} must have ids and as many labels, "
            f"got {list(ids.shape)} ids and {list(labels.shape)} labels"
        )
    pictures = _check_images(sample, int(np.count_nonzero(ids == IMAGE_TOKEN_ID)), num_visual_rows)
    ids, labels = ids[:max_seq_len], labels[:max_seq_len]
    repeats = _rows_of_ids(ids, rows_of_pictures(sample, num_visual_rows))
    ids, labels = (
        np.repeat(ids, repeats)[:max_seq_len],
        np.repeat(np.where(ids == IMAGE_TOKEN_ID, IGNORE_ID, labels), repeats)[:max_seq_len],
    )
    if sample.labels is not None:
        first_answer = int((labels != IGNORE_ID).argmax()) if (labels != IGNORE_ID).any() else len(ids)
    else:
        first_answer = int(repeats[: sample.first_answer].sum())
    source, num_images = _sources(pictures, int(np.count_nonzero(ids == IMAGE_TOKEN_ID)), num_visual_rows)
    return _Rows(ids, labels, source, num_images, first_answer)


def _sources(pictures: Sequence[PictureRows], rows: int, num_visual_rows: int) -> tuple[IntArray, int]:
    """Sources of the first `rows` rows of a sample's pictures, and the images of the pictures that they come from."""
    sources, images, left = [np.empty(0, dtype=np.int64)], 0, rows
    for picture in pictures:
        if left <= 0:
            break
        own = picture.source[:left]
        sources.append(np.where(own == NEWLINE, NEWLINE, own + num_visual_rows * images))
        images += picture.tiles
        left -= len(own)
    return np.concatenate(sources), images


def _check_images(sample: Sample, markers: int, num_visual_rows: int) -> Sequence[PictureRows]:
    """Rows of each picture of a sample with so many markers."""
    given = [t for t in (sample.pixel_values, sample.image_features) if t is not None]
    if len(given) > 1:
        raise DataError(f"sample {sample.record_id!r} must have pixel_values or image_features, got both")
    count = given[0].shape[0] if given else sample.image_count
    pictures = sample.pictures
    if pictures is None:
        pictures = (PictureRows.whole(num_visual_rows),) * markers
    elif len(pictures) != markers:
        raise DataError(
            f"sample {sample.record_id!r} must have one picture for each of its {markers} markers, got {len(pictures)}"
        )
    if count != (images := sum(picture.tiles for picture in pictures)):
        wanted = "one image for each" if sample.pictures is None else f"{images} tiles for the pictures"
        raise DataError(f"sample {sample.record_id!r} must have {wanted} of its {markers} markers, got {count}")
    # (A row that only marks an image says nothing about the rows of its features.)
    features = sample.image_features if count and num_visual_rows > 1 else None
    if features is not None and features.shape[1] != num_visual_rows:
        raise DataError(
            f"sample {sample.record_id!r}: image_features must be [{count}, {num_visual_rows}, C], "
            f"got {list(features.shape)}"
        )
    return pictures


def _shift(labels: IntArray) -> IntArray:
    """The target of each row is the label of the next one."""
    return np.append(labels[1:], IGNORE_ID)


def _guidance_rows(rows: _Rows, guidance: Guidance) -> IntArray:
    """Rows of one sample that guide its images; none when it has no image, since nobody would read them."""
    if not rows.num_images:
        return np.empty(0, dtype=np.int64)
    guides = (rows.labels == IGNORE_ID) & (rows.input_ids != IMAGE_TOKEN_ID)
    if guidance == "first_turn":
        guides[rows.first_answer :] = False
    return np.flatnonzero(guides)


def _join(tensors: Sequence[Tensor | None], counts: IntArray) -> Tensor | None:
    """The first `counts[i]` images of each sample one after the other; None when there are none."""
    kept = [t[:count] for t, count in zip(tensors, counts.tolist(), strict=True) if t is not None and count]
    return torch.cat(kept) if kept else None
