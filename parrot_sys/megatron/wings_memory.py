"""Memory of the learners of Wings in a micro-batch: which rows make up the memory, and who sees which of them.

T rows of a pack, S samples, R visual rows, N rows of the longest sample, V rows of an image, M rows of the memory:
visual rows first, then text rows, sample by sample in each. Nothing is read from the device, but the longest run of
visual rows when a cache is filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.megatron.attention.kv_cache import KVCache
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.modules.wings import WingsConfig

KINDS = ("visual", "textual")


@dataclass(frozen=True, kw_only=True, slots=True)
class WingsPlan(MemoryPlan):
    """The memory of the learners. `active`: rows whose learners the router weighs; others read text alone."""

    kinds: tuple[int, int]
    """Visual and text rows of the memory; `segments` count from the first of each kind."""
    source: Tensor
    """int64 [M]: row of the pack's embeddings, where T means a row of zeros and T + 1 + i for row i of an
    all-zero image (both only under the released rule)."""
    factors: Tensor
    """float32 [T, 2]: how often the blend of each learner is added."""
    uniform: Tensor | None = None
    """bool [T]: rows whose textual learner looks at all it sees alike (released rule)."""
    needs_blank: bool = False
    """Whether `source` names rows of an all-zero image."""
    routed: bool = True
    """False: visual learners alone, added as they are (first stage)."""
    decoding: bool = False
    """Keys come from the cache: segments count in its buffers, one after the other."""
    places: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """With a cache: request and place of the memory rows of each kind."""
    capacities: tuple[int | None, int | None] = (None, None)
    """With a cache: rows of a request's buffers of each kind."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """Results that layers compute once for all."""
    weights: dict[int, Tensor] | None = None
    """Number of each layer, from 1 -> float32 [T, 2], filled with the router's weights when it is a dictionary."""

    def per_row(self) -> tuple[str, ...]:
        """Fields with an entry for each row of the pack."""
        return ("segments", "active", "factors", *(("uniform",) if self.uniform is not None else ()))

    def keep(self, layer_number: int, weights: Tensor) -> None:
        """Keep a layer's router weights where they were asked for."""
        if self.weights is not None:
            self.weights[layer_number] = weights.detach()


def plan_memory(
    batch: PackedBatch,
    wings: WingsConfig,
    *,
    width: int,
    rows_per_image: int,
    routed: bool = True,
    cache: KVCache | None = None,
    weights: dict[int, Tensor] | None = None,
) -> WingsPlan:
    """Plan of a micro-batch, the same on every rank that works on it.

    Args:
        batch: of the whole model; under context parallelism the share of any rank.
        wings: settings.
        width: H.
        rows_per_image: V.
        routed: whether router and textual learners take part.
        cache: of the requests, for decoding.
        weights: filled with the router's weights, layer by layer.

    Raises:
        DataError: a sample is longer than the router's positions, or has images that the released rule does not know.
        ConfigError: the released rule is asked to decode with a cache.
    """
    check_length(wings, batch.max_seqlen + (0 if cache is None else cache.max_length))
    common: dict[str, Any] = {"width": width, "routed": routed, "weights": weights}
    if wings.rule == "released":
        if cache is not None:
            raise ConfigError(
                "the released rule of Wings lets earlier rows read later ones, which a KV cache cannot follow: "
                'generate with use_cache=False, or take the paper\'s rule (compat="paper")'
            )
        return _released(batch, wings, rows_per_image, common)
    if cache is not None and cache.max_length:
        return _decoding(batch, cache, common)
    plan = papers_plan(batch.cu_seqlens, batch.visual_rows, batch.position_ids, wings, **common)
    return plan if cache is None else _filling(plan, batch, wings, cache)


def check_length(wings: WingsConfig, longest: int) -> None:
    """Refuses samples of more rows than the router has weights for.

    Raises:
        DataError: there are such samples.
    """
    if longest > wings.router_positions:
        raise DataError(
            f"a sample must have at most {wings.router_positions} rows with its images, got {longest}: the router has "
            "weights for so many positions (model.wings.router_positions)"
        )


def papers_plan(
    cu_seqlens: Tensor, visual_rows: Tensor, position_ids: Tensor, wings: WingsConfig, **common: Any
) -> WingsPlan:
    """Each row reads the images and the text of its sample up to itself; not the system prompt, if there are images.

    Args:
        cu_seqlens: int32 [S + 1].
        visual_rows: int64 [R], ascending.
        position_ids: int64 [T], place of each row in its sample.
        wings: settings.
        common: further fields of the plan.
    """
    device, num_rows = position_ids.device, position_ids.numel()
    bounds = cu_seqlens.long()
    rows = torch.arange(num_rows, device=device)
    is_visual = _flags(visual_rows, num_rows)
    before = _counts(is_visual)  # [T + 1] visual rows before each
    sample = _owners(rows, cu_seqlens)
    start, stop = bounds[sample], bounds[sample + 1]
    active = before[stop] > before[start]
    skipped = torch.minimum(start + wings.system_prompt_length, stop)
    first_text = torch.where(active, skipped - before[skipped], start - before[start])
    segments = _segments((before[start], before[rows + 1]), (first_text, rows + 1 - before[rows + 1]))
    num_visual = visual_rows.numel()
    text_rows = torch.argsort(is_visual, stable=True)[: num_rows - num_visual]
    source = torch.cat((visual_rows, text_rows))
    return WingsPlan(
        **common,
        rows=num_rows,
        kinds=(num_visual, num_rows - num_visual),
        source=source,
        positions=position_ids[source],
        segments=segments,
        active=active,
        factors=torch.ones(num_rows, 2, device=device),
    )


def _filling(plan: WingsPlan, batch: PackedBatch, wings: WingsConfig, cache: KVCache) -> WingsPlan:
    """The plan of a prefill, which puts the memory into the cache too."""
    bounds = batch.cu_seqlens.long()
    before = _counts(_flags(batch.visual_rows, batch.num_rows))
    visual = before[bounds[1:]] - before[bounds[:-1]]  # [S]
    skipped = torch.minimum(bounds[:-1] + wings.system_prompt_length, bounds[1:])
    first_text = torch.where(visual > 0, skipped - bounds[:-1] - (before[skipped] - before[bounds[:-1]]), 0)
    cache.facts = {"visual_rows": visual, "first_text": first_text}
    owner = _owners(plan.source, batch.cu_seqlens)
    own_rows = plan.source - bounds[owner]
    seen = before[plan.source] - before[bounds[owner]]
    num_visual = plan.kinds[0]
    places = (
        (owner[:num_visual], seen[:num_visual]),
        (owner[num_visual:], (own_rows - seen)[num_visual:]),
    )
    cache.visual_capacity = max(1, int(visual.max()) if visual.numel() else 0)
    return replace(plan, places=places, capacities=(cache.visual_capacity, None))


def _decoding(batch: PackedBatch, cache: KVCache, common: dict[str, Any]) -> WingsPlan:
    """One new text row for each request, which reads all that the cache holds of it."""
    device, count = batch.input_ids.device, batch.num_rows
    requests = torch.arange(count, device=device)
    visual, first_text = cache.facts["visual_rows"], cache.facts["first_text"]
    text = cache.lengths - visual
    none = torch.empty(0, dtype=torch.int64, device=device)
    longest = cache.visual_capacity
    first, all_text = requests * longest, requests * cache.capacity
    segments = _segments((first, first + visual), (all_text + first_text, all_text + text + 1))
    return WingsPlan(
        **common,
        rows=count,
        kinds=(0, count),
        source=requests,
        positions=batch.position_ids,
        segments=segments,
        active=visual > 0,
        factors=torch.ones(count, 2, device=device),
        decoding=True,
        places=((none, none), (requests, text)),
        capacities=(longest, None),
    )


def _released(batch: PackedBatch, wings: WingsConfig, rows_per_image: int, common: dict[str, Any]) -> WingsPlan:
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
    is_visual = _flags(batch.visual_rows, num_rows + 1)
    lists = _text_lists(is_visual, bounds, longest, left_out if mixed else 0, num_visual)
    rows = torch.arange(num_rows, device=device)
    sample = _owners(rows, batch.cu_seqlens)
    before = _counts(is_visual[:num_rows])
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
    return WingsPlan(
        **common,
        rows=num_visual + blank.numel() + lists.source.numel(),
        kinds=(num_visual + blank.numel(), lists.source.numel()),
        source=torch.cat((batch.visual_rows, blank, lists.source)),
        positions=torch.cat((*image_positions, lists.positions)),
        segments=_segments((first_image, first_image + read), (start, start + seen)),
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
        before=torch.arange(flags.numel() + 1, device=bounds.device) - _counts(flags),
        width=width,
        first_visual=is_visual[cells].int().argmax(1) if cells.numel() else bounds[:-1],
    )


def _segments(visual: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> Tensor:
    """int32 [T, 2, 2] from the first and one past the last memory row of each kind, [T] each."""
    return torch.stack((torch.stack(visual, dim=1), torch.stack(text, dim=1)), dim=1).to(torch.int32)


def _flags(rows: Tensor, num_rows: int) -> Tensor:
    """bool [num_rows], set at `rows`."""
    return torch.zeros(num_rows, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)


def _counts(flags: Tensor) -> Tensor:
    """[T] -> [T + 1]: how many are set before each, and in all."""
    return torch.cat((torch.zeros(1, dtype=torch.int64, device=flags.device), flags.cumsum(0)))


def _owners(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sample of each row; of equal boundaries (empty samples) the last one owns the row."""
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def gather_memory(embeddings: Tensor, plan: WingsPlan, blank: Tensor | None) -> Tensor:
    """The memory [M, H] from the embeddings [T, H] with images in place, and the rows [V, H] of an all-zero image."""
    nothing = embeddings.new_zeros(1, embeddings.shape[1])
    everything = [embeddings, nothing] if blank is None else [embeddings, nothing, blank]
    return torch.cat(everything).index_select(0, plan.source)
