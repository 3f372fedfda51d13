"""Tokens that guide the routing of images: from the token ids of a padded or packed batch, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parrot_sys.errors import DataError

# b rows of a batch, s tokens of each (one marker an image), n images or tiles, G guiding tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TextGuidance:
    """Which tokens of a batch guide the routing of which image."""

    rows: Tensor  # int64 [G], positions in the flattened [b * s] tokens, sample by sample
    start: Tensor  # int64 [n], first of the guiding tokens of each image, counted in `rows`
    end: Tensor  # int64 [n], one past the last


def text_guidance(
    input_ids: Tensor,
    *,
    image_token_id: int,
    loss_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    sample_ids: Tensor | None = None,
    tiles: Tensor | None = None,
) -> TextGuidance:
    """Guiding tokens of each image: the text of its sample but answers and padding, as in the released Parrot.

    Looks at values on the host, so best called where the batch still is on the CPU.

    Args:
        input_ids: int [b, s], one `image_token_id` for each image, in the order of the images.
        image_token_id: marks an image.
        loss_mask: [b, s], not 0 where the NEXT token is an answer (Megatron's loss mask); without it every text token
            guides, which is right for prompts.
        text_mask: bool [b, s], False for padding and for whatever else must not guide.
        pad_token_id: leading and trailing tokens with this id are padding of their sample. Inside a sample they guide,
            so a tokenizer whose end-of-text token also pads is no problem.
        sample_ids: int [b, s], sample of each token, ascending, negative outside any sample; by default each row of the
            batch is a sample. `packed_sample_ids` makes them for packs.
        tiles: int [number of images], tiles that each image was cut into; each is routed by itself. None for one each.

    Raises:
        DataError: `tiles` or `sample_ids` contradict the tokens.
    """
    is_image = input_ids == image_token_id
    if sample_ids is None:
        sample_ids = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    _check_samples(sample_ids, is_image)
    guiding = ~is_image & (sample_ids >= 0)
    if loss_mask is not None:
        # The first token of a sample is no answer, whatever the mask says of the sample before it in a pack.
        answer = (loss_mask[:, :-1] != 0) & (sample_ids[:, 1:] == sample_ids[:, :-1])
        guiding[:, 1:] &= ~answer
    if text_mask is not None:
        guiding &= text_mask.to(guiding)
    if pad_token_id is not None:
        guiding &= ~_padding(input_ids == pad_token_id, sample_ids)
    counts = torch.bincount(sample_ids[guiding], minlength=int(sample_ids.max()) + 1 if sample_ids.numel() else 0)
    sample = sample_ids[is_image]
    if tiles is not None:
        sample = sample.repeat_interleave(_tiles_of_each(tiles, sample))
    end = counts.cumsum(0)[sample]
    return TextGuidance(rows=guiding.flatten().nonzero()[:, 0], start=end - counts[sample], end=end)


def packed_sample_ids(
    input_ids: Tensor,
    packed_seq_params: PackedSeqParams,
    *,
    image_token_id: int,
    rows_per_image: int,
    tiles: Tensor | None = None,
) -> Tensor:
    """Sample of each token of a pack, int64 like `input_ids`, -1 for tokens outside every sample.

    Args:
        input_ids: int [b, s], with one marker an image.
        packed_seq_params: lengths of the samples, counted in rows of the decoder, where each marker has become the rows
            of its image; with `cu_seqlens_q_padded` the samples start there and are padded at their ends.
        image_token_id: marks an image.
        rows_per_image: rows of the decoder for each image or tile; 1 where the lengths count tokens.
        tiles: int [number of images], tiles of each image. None for one each.

    Raises:
        DataError: an image does not lie inside one sample, or the lengths do not fit the batch.
    """
    lengths = packed_seq_params.cu_seqlens_q.to(input_ids.device, torch.int64).diff()
    padded = packed_seq_params.cu_seqlens_q_padded
    starts = (packed_seq_params.cu_seqlens_q if padded is None else padded).to(input_ids.device, torch.int64)
    is_image = input_ids == image_token_id
    width = torch.ones_like(input_ids, dtype=torch.int64)
    width[is_image] = rows_per_image * (1 if tiles is None else _tiles_of_each(tiles, is_image.nonzero()))
    end = width.cumsum(1)
    if len(input_ids) > 1:
        longest = int(end[:, -1].max())
        if int(starts[-1]) != len(input_ids) * longest:
            raise DataError(
                f"cu_seqlens must end at {len(input_ids)} x {longest} rows, those of the batch with its images in "
                f"place, got {int(starts[-1])}: pack a batch into one row"
            )
        end = end + longest * torch.arange(len(input_ids), device=end.device)[:, None]
    sample = torch.searchsorted(starts, end - width, right=True) - 1
    inside = sample < len(lengths)
    sample = sample.clamp(max=len(lengths) - 1)
    inside &= end <= starts[sample] + lengths[sample]
    if bool((is_image & ~inside).any()):
        number = int((~inside[is_image]).nonzero()[0, 0])
        raise DataError(
            f"image {number} does not lie inside one sample of cu_seqlens ({starts.tolist()}): its lengths must count "
            f"rows of the decoder, {rows_per_image} for each image or tile, not tokens"
        )
    return sample.masked_fill(~inside, -1)


def _check_samples(sample_ids: Tensor, is_image: Tensor) -> None:
    if bool((is_image & (sample_ids < 0)).any()):
        raise DataError("an image lies outside every sample: sample_ids must not be negative at image markers")
    inside = sample_ids[sample_ids >= 0]
    if bool((inside[1:] < inside[:-1]).any()):
        raise DataError("sample_ids must ascend through the flattened batch, so that each sample is one piece")


def _tiles_of_each(tiles: Tensor, images: Tensor) -> Tensor:
    tiles = torch.as_tensor(tiles, device=images.device)
    if len(tiles) != len(images):
        raise DataError(f"the batch has {len(images)} image markers, but tiles for {len(tiles)} images")
    return tiles


def _padding(is_pad: Tensor, sample_ids: Tensor) -> Tensor:
    """Bool [b, s], tokens with nothing but padding before them, or nothing but padding after them, in their sample."""
    pad, sample = is_pad.flatten(), sample_ids.flatten().clamp(min=0)
    content = (~pad & (sample_ids.flatten() >= 0)).long()
    total = torch.bincount(sample, weights=content, minlength=1).long()
    before = content.cumsum(0) - content - (total.cumsum(0) - total)[sample]
    return (pad & ((before == 0) | (before == total[sample]))).view_as(is_pad)
