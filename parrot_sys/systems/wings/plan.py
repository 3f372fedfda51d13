"""Memory of the learners of Wings, by the paper's rule and the public code's, in training and beside a paged cache.

T rows of a pack, S samples, R visual rows, N rows of the longest sample, V rows of an image, M rows of the memory
(`learner_memory`). Nothing is read from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.embed.learner_memory import (
    KINDS,
    LearnerPlan,
    check_length,
    counts_before,
    memory_segments,
    papers_plan,
    row_flags,
    sample_of,
)
from parrot_sys.systems.wings.config import WingsConfig


def plan_memory(
    batch: PackedBatch,
    wings: WingsConfig,
    *,
    width: int,
    rows_per_image: int,
    routed: bool = True,
    paged: PagedRows | None = None,
    weights: dict[int, Tensor] | None = None,
) -> LearnerPlan:
    """Plan of a micro-batch, the same on every rank that works on it.

    Args:
        batch: of the whole model; under context parallelism the share of any rank.
        wings: settings.
        width: H.
        rows_per_image: V.
        routed: whether router and textual learners take part.
        paged: places of the rows in a paged cache, which holds the memory of their requests as well.
        weights: filled with the router's weights, layer by layer.

    Raises:
        DataError: a sample is longer than the router's positions, or has images that the released rule does not know.
        ConfigError: the released rule is asked to decode with a cache.
    """
    if paged is None:  # (the engine knows how long its requests may become)
        check_length(wings, batch.max_seqlen)
    common: dict[str, Any] = {"width": width, "routed": routed, "weights": weights}
    if wings.rule == "released":
        if paged is not None:
            raise ConfigError(
                "the released rule of Wings lets earlier rows read later ones, which a KV cache cannot follow: "
                'generate with use_cache=False, or take the paper\'s rule (compat="paper")'
            )
        return _released(batch, wings, rows_per_image, common)
    if paged is not None:
        return _paged(batch, wings, paged, common)
    return papers_plan(batch.cu_seqlens, batch.visual_rows, batch.position_ids, wings, **common)


def _paged(batch: PackedBatch, wings: WingsConfig, paged: PagedRows, common: dict[str, Any]) -> LearnerPlan:
    """The memory of a step's own rows, which the layers put into the cache; masks there tell the kinds apart."""
    device, count, num_visual = batch.input_ids.device, batch.num_rows, batch.visual_rows.numel()
    is_visual = row_flags(batch.visual_rows, count)
    skipped = paged.has_images & (batch.position_ids < wings.system_prompt_length)
    for kind, rows in zip(KINDS, (is_visual, ~(is_visual | skipped)), strict=True):
        paged.set_mask(kind, rows)
    text_rows = torch.argsort(is_visual, stable=True)[: count - num_visual]
    source = torch.cat((batch.visual_rows, text_rows))
    return LearnerPlan(
        **common,
        rows=count,
        kinds=(num_visual, count - num_visual),
        source=source,
        positions=batch.position_ids[source],
        segments=torch.zeros(count, 2, 2, dtype=torch.int32, device=device),
        active=paged.has_images,
        factors=torch.ones(count, 2, device=device),
    )


def _released(batch: PackedBatch, wings: WingsConfig, rows_per_image: int, common: dict[str, Any]) -> LearnerPlan:
    """As the public code computes (AIDC-AI/Wings 5dec325), defects included.

    The text of a sample is a list without the system prompt and the image, and row i of the sample sees its first i + 1
    entries, whatever their positions. Samples are padded to the longest, and the padding is in the list. Every row sees
    the whole image. The blend is added twice. A text-only sample among samples with images gets an all-zero image,
    whose blend is added once, and makes all lists as long as the padded samples: the last entry is repeated, and as
    many rows at the end of a sample with an image see all entries alike.
    """
    counts = None if batch.context is None else sum(batch.context.image_counts)
    num_images, samples, longest = counts or batch.num_images, batch.num_samples, batch.max_seqlen
    num_rows, device = batch.num_rows, batch.input_ids.device
    if batch.visual_rows.numel() != num_images * rows_per_image or num_images > samples:
        raise DataError(
            f"the released rule of Wings knows one whole image a sample at most, got {num_images} images and "
            f'{batch.visual_rows.numel()} rows of them in {samples} samples: take the paper\'s rule (compat="paper")'
        )
    mixed = 0 < num_images < samples
    left_out = wings.system_prompt_length + rows_per_image
    bounds, num_visual = batch.cu_seqlens.long(), batch.visual_rows.numel()
    lengths = bounds.diff()
    is_visual = row_flags(batch.visual_rows, num_rows + 1)
    lists = _text_lists(is_visual, bounds, longest, left_out if mixed else 0, num_visual)
    rows = torch.arange(num_rows, device=device)
    sample = sample_of(rows, batch.cu_seqlens)
    before = counts_before(is_visual[:num_rows])
    visual = before[bounds[1:]] - before[bounds[:-1]]
    has_image = visual > 0
    skipped = torch.where(has_image, lists.first_visual.clamp(max=wings.system_prompt_length), 0)
    entries = torch.full_like(lengths, longest) if mixed else longest - visual - skipped
    start = lists.before[torch.arange(samples, device=device) * lists.width + skipped][sample]
    own = rows - bounds[sample]
    seen = torch.minimum(torch.minimum(own + 1, lengths[sample]), entries[sample])
    uniform = None
    if mixed:
        uniform = has_image[sample] & (own >= longest - left_out)
        seen = torch.where(uniform, longest, seen)
    first_image = torch.where(has_image, before[bounds[:-1]], num_visual)[sample]
    read = torch.full_like(first_image, rows_per_image if num_images else 0)
    blank = num_rows + 1 + torch.arange(rows_per_image if mixed else 0, device=device)
    factors = torch.full((num_rows, 2), 2.0, device=device)
    factors[:, 0] -= (~has_image[sample]).float()
    image_positions = (batch.position_ids[batch.visual_rows], blank - num_rows - 1)
    return LearnerPlan(
        **common,
        rows=num_visual + blank.numel() + lists.source.numel(),
        kinds=(num_visual + blank.numel(), lists.source.numel()),
        source=torch.cat((batch.visual_rows, blank, lists.source)),
        positions=torch.cat((*image_positions, lists.positions)),
        segments=memory_segments((first_image, first_image + read), (start, start + seen)),
        active=torch.full((num_rows,), num_images > 0, device=device),
        factors=factors,
        uniform=uniform,
        needs_blank=mixed,
    )


@dataclass(frozen=True, slots=True)
class _TextLists:
    """The text of every padded sample, one list after the other (released rule)."""

    source: Tensor  # row of the pack, T where it is padding
    positions: Tensor  # place in the sample
    before: Tensor  # entries before each cell of the grid [S, width] of padded samples, flat
    width: int
    first_visual: Tensor  # [S] place of the first visual row, 0 without


def _text_lists(is_visual: Tensor, bounds: Tensor, longest: int, repeats: int, num_visual: int) -> _TextLists:
    """
    Args:
        is_visual: bool [T + 1], the last one False.
        bounds: int64 [S + 1].
        longest: N, to which samples are padded.
        repeats: how often the last place of each is repeated.
        num_visual: R.
    """
    num_rows, samples, width = is_visual.numel() - 1, bounds.numel() - 1, longest + repeats
    columns = torch.arange(width, device=bounds.device)
    places = columns.clamp(max=max(longest - 1, 0))
    cells = torch.where(places < bounds.diff()[:, None], bounds[:-1, None] + places, num_rows)  # [S, width]
    flags = (is_visual[cells] & (columns < longest)).flatten()
    text = torch.argsort(flags, stable=True)[: flags.numel() - num_visual]
    return _TextLists(
        source=cells.flatten()[text],
        positions=places.repeat(samples)[text],
        before=torch.arange(flags.numel() + 1, device=bounds.device) - counts_before(flags),
        width=width,
        first_visual=is_visual[cells].int().argmax(1) if cells.numel() else bounds[:-1],
    )
