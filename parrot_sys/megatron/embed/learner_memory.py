"""Memory of the learners in a micro-batch: which rows make up the memory, and who sees which of them.

T rows of a pack, S samples, R visual rows, V rows of an image, M rows of the memory: visual rows first, then text rows,
sample by sample in each. Nothing is read from the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parrot_sys.errors import DataError
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.modules.learners import LearnersConfig

KINDS = ("visual", "textual")


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerPlan(MemoryPlan):
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


def check_length(settings: LearnersConfig, longest: int) -> None:
    """Refuses samples of more rows than the router has weights for.

    Raises:
        DataError: there are such samples.
    """
    if longest > settings.router_positions:
        raise DataError(
            f"a sample must have at most {settings.router_positions} rows with its images, got {longest}: the router "
            f"has weights for so many positions ({settings.key}.router_positions)"
        )


def papers_plan(
    cu_seqlens: Tensor, visual_rows: Tensor, position_ids: Tensor, settings: LearnersConfig, **common: Any
) -> LearnerPlan:
    """Each row reads the images and the text of its sample up to itself; not the system prompt, if there are images.

    Args:
        cu_seqlens: int32 [S + 1].
        visual_rows: int64 [R], ascending.
        position_ids: int64 [T], place of each row in its sample.
        settings: of the learners.
        common: further fields of the plan.
    """
    device, num_rows = position_ids.device, position_ids.numel()
    bounds = cu_seqlens.long()
    rows = torch.arange(num_rows, device=device)
    is_visual = row_flags(visual_rows, num_rows)
    before = counts_before(is_visual)  # [T + 1] visual rows before each
    sample = sample_of(rows, cu_seqlens)
    start, stop = bounds[sample], bounds[sample + 1]
    active = before[stop] > before[start]
    skipped = torch.minimum(start + settings.system_prompt_length, stop)
    first_text = torch.where(active, skipped - before[skipped], start - before[start])
    segments = memory_segments((before[start], before[rows + 1]), (first_text, rows + 1 - before[rows + 1]))
    num_visual = visual_rows.numel()
    text_rows = torch.argsort(is_visual, stable=True)[: num_rows - num_visual]
    source = torch.cat((visual_rows, text_rows))
    return LearnerPlan(
        **common,
        rows=num_rows,
        kinds=(num_visual, num_rows - num_visual),
        source=source,
        positions=position_ids[source],
        segments=segments,
        active=active,
        factors=torch.ones(num_rows, 2, device=device),
    )


def memory_segments(visual: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor]) -> Tensor:
    """int32 [T, 2, 2] from the first and one past the last memory row of each kind, [T] each."""
    return torch.stack((torch.stack(visual, dim=1), torch.stack(text, dim=1)), dim=1).to(torch.int32)


def row_flags(rows: Tensor, num_rows: int) -> Tensor:
    """bool [num_rows], set at `rows`."""
    return torch.zeros(num_rows, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)


def counts_before(flags: Tensor) -> Tensor:
    """[T] -> [T + 1]: how many are set before each, and in all."""
    return torch.cat((torch.zeros(1, dtype=torch.int64, device=flags.device), flags.cumsum(0)))


def sample_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sample of each row; of equal boundaries (empty samples) the last one owns the row."""
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def gather_memory(embeddings: Tensor, plan: LearnerPlan, blank: Tensor | None) -> Tensor:
    """The memory [M, H] from the embeddings [T, H] with images in place, and the rows [V, H] of an all-zero image."""
    nothing = embeddings.new_zeros(1, embeddings.shape[1])
    everything = [embeddings, nothing] if blank is None else [embeddings, nothing, blank]
    return torch.cat(everything).index_select(0, plan.source)
