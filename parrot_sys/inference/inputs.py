"""Padded ids with image markers, as the released code takes them, to packed batches and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.packing import Sample
from parrot_sys.data.picture import Picture, join_pictures
from parrot_sys.errors import DataError
from parrot_sys.towers import PictureRows

Images = Tensor | Sequence[Tensor] | Sequence[Picture] | None


def split_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    images: Images = None,
    labels: Tensor | None = None,
    answer_header: Sequence[int] = (),
) -> list[Sample]:
    """The samples of a padded batch.

    Args:
        input_ids: int64 [B, N], -200 once for each image.
        attention_mask: [B, N], 0 where a row is padding (left or right); None: nothing is padding.
        images: float [n, 3, h, w], or a list of [3, h, w] and [k, 3, h, w]. As many as there are markers: taken in
            their order. Else one for each sample, of which those of samples without a marker are left out (the released
            code gives a text-only sample a dummy image). `processor.pictures(...)` where pictures are cut into tiles.
            MultiModal-GPT's [B, k, 1, 3, h, w] has k images for each
            sample, of which the first are taken, as many as the sample has markers.
        labels: int64 [B, N], -100 where a row bears no loss.
        answer_header: ids that open an answer; without labels they tell where the first one begins.

    Raises:
        DataError: shapes, mask or images do not fit the ids.
    """
    if input_ids.dim() != 2:
        raise DataError(f"input_ids must be [B, N], got {list(input_ids.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise DataError(f"{name} must be {list(input_ids.shape)} like input_ids, got {list(tensor.shape)}")
    ids = input_ids.detach().cpu()
    kept = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    targets = None if labels is None else labels.detach().cpu()
    samples = [row[mask] for row, mask in zip(ids, kept, strict=True)]
    if empty := [index for index, sample in enumerate(samples) if not sample.numel()]:
        raise DataError(f"attention_mask must leave at least one row in each sample, got none in samples {empty}")
    markers = [int((sample == IMAGE_TOKEN_ID).sum()) for sample in samples]
    assigned = _assign_pictures(markers, images)
    return [
        Sample(
            input_ids=sample,
            labels=None if targets is None else targets[index][kept[index]],
            first_answer=first_answer_after(sample.tolist(), answer_header),
            pixel_values=assigned[index][0],
            pictures=assigned[index][1],
        )
        for index, sample in enumerate(samples)
    ]


def padding_mask(input_ids: Tensor, pad_token_id: int | None, eos_token_ids: Collection[int]) -> Tensor | None:
    """Mask of a batch that came without one: padding ids at either end of a row are padding.

    Args:
        input_ids: int64 [B, N].
        pad_token_id: id of the padding; None: nothing is padding.
        eos_token_ids: ids that end turns. If the padding id is among them, it may occur as text.

    Returns:
        bool [B, N], or None where nothing is padding.

    Raises:
        DataError: an id at the end of a row may be padding or the end of a turn: answers would depend on how far the
            other requests of the batch made it be padded.
    """
    if pad_token_id is None or input_ids.dim() != 2:
        return None
    text = (input_ids != pad_token_id).int()
    inside = (text.cumsum(1) > 0) & (text.flip(1).cumsum(1).flip(1) > 0)
    inside |= ~inside.any(1, keepdim=True)  # a row of nothing else is text
    if bool(inside.all()):
        return None
    if pad_token_id not in eos_token_ids:
        return inside
    if len(input_ids) == 1:
        return None
    index = int((~inside).any(1).int().argmax())
    raise DataError(
        f"sample {index} of input_ids begins or ends with id {pad_token_id}, which is the padding and also ends turns: "
        "pass attention_mask (0 on padding) to say which it is there"
    )


def first_answer_after(ids: Sequence[int], header: Sequence[int]) -> int | None:
    """Index where the first answer begins, after the first `header`; None when it does not occur or is empty."""
    if not header:
        return None
    ids, header = list(ids), list(header)
    starts = range(len(ids) - len(header) + 1)
    return next((start + len(header) for start in starts if ids[start : start + len(header)] == header), None)


def _assign_pictures(markers: list[int], images: Images) -> list[tuple[Tensor | None, tuple[PictureRows, ...] | None]]:
    """The images of each sample, [k, 3, h, w] or None, and the rows of its pictures if they are cut into tiles."""
    pictures = [] if images is None or isinstance(images, Tensor) else [p for p in images if isinstance(p, Picture)]
    if not pictures:
        return [(pixels, None) for pixels in _assign_images(markers, cast("Tensor | Sequence[Tensor] | None", images))]
    if len(pictures) != sum(markers):
        raise DataError(
            f"images must be as many pictures as the {sum(markers)} image markers (-200) in input_ids, "
            f"got {len(pictures)}"
        )
    ends = [sum(markers[: index + 1]) for index in range(len(markers))]
    return [join_pictures(pictures[end - count : end]) for end, count in zip(ends, markers, strict=True)]


def _assign_images(markers: list[int], images: Tensor | Sequence[Tensor] | None) -> list[Tensor | None]:
    """The images of each sample, [k, 3, h, w] or None."""
    if isinstance(images, Tensor) and images.dim() == 6:
        return _assign_rows_of_images(markers, images)
    single = [images] if isinstance(images, Tensor) else list(images or ())
    parts = [image if image.dim() == 4 else image.unsqueeze(0) for image in single]
    pixels = torch.cat(parts) if parts else torch.empty(0, 3, 0, 0)
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise DataError(f"images must be [n, 3, h, w], got {list(pixels.shape)}")
    count = pixels.shape[0]
    if count == sum(markers):
        each = pixels.split(markers)
    elif count == len(markers) and max(markers) <= 1:
        each = tuple(pixels[index : index + number] for index, number in enumerate(markers))
    else:
        raise DataError(
            f"images must be as many as the {sum(markers)} image markers (-200) in input_ids, or one for each of the "
            f"{len(markers)} samples with at most one marker; got {count} for samples with {markers} markers"
        )
    return [part if part.shape[0] else None for part in each]


def _assign_rows_of_images(markers: list[int], images: Tensor) -> list[Tensor | None]:
    """From [B, k, 1, 3, h, w], as OpenFlamingo takes them: k images of one frame for each sample."""
    count, each, frames, channels = images.shape[:4]
    if (count, frames, channels) != (len(markers), 1, 3) or max(markers) > each:
        raise DataError(
            f"images must be [{len(markers)}, k, 1, 3, h, w] with k >= {max(markers)}, the most markers of a sample, "
            f"got {list(images.shape)}"
        )
    return [row[:number, 0] if number else None for row, number in zip(images, markers, strict=True)]


def pad_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed rows [T, ...] of samples with these lengths -> [B, longest, ...], right-padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(list(lengths))), batch_first=True)
