"""MultiModal-GPT on Megatron: a resampler makes latents of the images, which text reads by gated cross-attention."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.bridge import Embedded
from parrot_sys.modules.gated_cross_attention import MediaSpans, media_spans
from parrot_sys.modules.perceiver import PerceiverResampler
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.parallel import all_gather_rows
from parrot_sys.systems.bridge import SystemBridge
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.multimodal_gpt.layers import flamingo_layer_spec


class MultimodalGptBridge(SystemBridge):
    """Latents of the images beside the text, and gated blocks in front of layers (arXiv 2305.04790)."""

    resampler: PerceiverResampler | None = None

    def build(self) -> None:
        """Makes the resampler."""
        self.resampler = PerceiverResampler(
            self.flamingo.resampler, self.vision.hidden_size, dtype=self.config.params_dtype
        )

    @property
    def flamingo(self) -> FlamingoConfig:
        """Settings of resampler and gated blocks."""
        assert self.model.flamingo is not None, "the registry chose this bridge"
        return self.model.flamingo

    @property
    def layers_differ(self) -> bool:
        """True: layers with and without a gated block."""
        return True

    def modules(self) -> Mapping[str, nn.Module | None]:
        """The resampler."""
        return {"resampler": self.resampler}

    @property
    def steps_alike(self) -> bool:
        """No: what the layers read besides their rows is planned for each step."""
        return False

    def layer_spec(self, spec: ModuleSpec, number: int) -> ModuleSpec:
        """The layer, with a gated block in front where there is one."""
        return flamingo_layer_spec(spec, self.flamingo, self.vision.hidden_size, number, self.model.lora)

    def plan(
        self,
        batch: PackedBatch,
        paged: PagedRows | None = None,
        *,
        output_router_weights: bool = False,
    ) -> MemoryPlan | None:
        """Spans of latents that rows read: of the images of the micro-batch, or of those of a step's requests."""
        if paged is not None:
            return self._memory_plan(self._paged_spans(paged), batch.num_images * self.num_latents)
        flamingo, latents = self.flamingo, self.num_latents
        spans = media_spans(batch.visual_rows, batch.cu_seqlens, batch.num_rows, latents, flamingo.media_rule)
        return self._memory_plan(spans, batch.visual_rows.numel() * latents)

    @property
    def num_latents(self) -> int:
        """Latents of an image."""
        return self.flamingo.resampler.num_latents

    def image_readers(self, places: Sequence[range]) -> list[range]:
        """Rows that read each image: by the rule `next` those since the image before it, else those up to the next."""
        starts = [place.start for place in places]
        if self.flamingo.media_rule == "next":
            return [range(last + 1, start + 1) for last, start in zip([-1, *starts], starts, strict=False)]
        return [range(start, after) for start, after in zip(starts, [*starts[1:], sys.maxsize], strict=False)]

    def encode_images(
        self, decoder: Any, batch: PackedBatch, counts: Sequence[int], override: RoutingOverride | None
    ) -> tuple[list[Tensor], RoutingOutput | None]:
        """Latents [L, C] of each image; nothing is routed."""
        assert self.resampler is not None, "the first stage has the resampler"
        return list(self.resampler(self.image_features(batch))), None

    def _paged_spans(self, paged: PagedRows) -> MediaSpans:
        """Latents that each row of a step reads, among those of the step's images."""
        reads = paged.image_of_row >= 0
        start = torch.where(reads, paged.image_of_row * self.num_latents, 0)
        end = torch.where(reads, start + self.num_latents, start)
        return MediaSpans(start=start.int(), end=end.int(), active=paged.has_images)

    def _memory_plan(self, spans: MediaSpans, rows: int) -> MemoryPlan:
        segments = torch.stack((spans.start, spans.end), dim=-1).unsqueeze(1)
        return MemoryPlan(rows=rows, width=self.vision.hidden_size, segments=segments, active=spans.active)

    def embed(
        self,
        decoder: Any,
        batch: PackedBatch,
        plan: MemoryPlan | None,
        override: RoutingOverride | None,
        *,
        paged: bool,
    ) -> Embedded:
        """Rows [T, H], with that of the image token for images, and their latents [M, C]; None when none are read."""
        assert plan is not None, "there is a plan for every micro-batch"
        assert self.resampler is not None, "the first stage has the resampler"
        ids = batch.input_ids
        rows = decoder.embed(torch.where(ids < 0, self.flamingo.image_token_id, ids))
        if batch.image_rows is not None:
            return Embedded(rows=rows, memory=batch.image_rows.to(rows.dtype))
        if plan.rows == 0 and not torch.is_grad_enabled():
            return Embedded(rows=rows)
        latents = self.resampler(self.image_features(batch))  # [n, L, C]
        if batch.context is not None:
            latents = all_gather_rows(latents, batch.context.image_counts, self.groups.cp)
        if plan.rows == 0:
            # Nobody reads them, but the hooks of every parameter must fire: in training they hang on the text.
            rows = rows + latents.sum().to(rows.dtype)
        return Embedded(rows=rows, memory=latents.flatten(0, 1))
