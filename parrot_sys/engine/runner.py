"""One rank's part of the model, as the engine calls it: pictures, and steps over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.data.constants import IGNORE_ID
from parrot_sys.data.packing import Guidance
from parrot_sys.engine.graphs import Capture, DecodeGraphs
from parrot_sys.engine.inputs import StepInputs
from parrot_sys.engine.requests import ImageReaders
from parrot_sys.megatron.attention.paged import PagedCache, PagedRows
from parrot_sys.megatron.model import MultimodalModel
from parrot_sys.megatron.runtime.pipeline import forward_logits, share_routes
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.systems.build import config_of
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.towers import NEWLINE

_CPU = torch.device("cpu")


class RankModel:
    """The part of a model that this rank has. All ranks of a layout call it alike, with the same arguments."""

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model
        self._cache: PagedCache | None = None
        self._graphs: DecodeGraphs | None = None
        self.capture: Capture | None = None
        """How caches opened from now on have steps of answers recorded (`graphs.capture_graph`); None: not at all."""
        self._last: tuple[StepInputs, PackedBatch, PagedRows, Tensor] | None = None
        """The last step, with its rows wanted: steps that continue the same answers share their tensors with it."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> ParrotConfig:
        """Sizes and options of the model."""
        return config_of(self.model)

    @property
    def identity(self) -> bytes:
        """Tells its keys and values from those of other models; an engine has one model."""
        return b""

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.bridge.llm.vocab_size

    @property
    def rows_per_image(self) -> int:
        """Rows that take the place of an image."""
        return self.config.rows_per_image

    @property
    def most_images(self) -> int | None:
        """Most images of a request; None for any number."""
        return self.config.most_images

    @property
    def guidance(self) -> Guidance:
        """Which text guides routes."""
        return self.config.moe.guidance

    @property
    def guided(self) -> bool:
        """Whether text guides routes at all."""
        return self.num_experts > 0

    @property
    def num_experts(self) -> int:
        """Experts among which the prompt chooses; 0 where there are none."""
        return self.model.bridge.num_routed_experts

    @property
    def readers(self) -> ImageReaders:
        """Which rows hold or read an image."""
        return self.model.bridge.image_readers

    @property
    def takes_cache(self) -> bool:
        """Whether keys and values can be kept: not where earlier rows read later ones."""
        return self.model.bridge.takes_cache

    def open_cache(self, num_blocks: int, block_size: int) -> None:
        """Makes an empty cache, in the place of the last one."""
        self._last, self._graphs = None, None
        device, model = self.device, self.model
        if self.capture is None or not DecodeGraphs.supports(model):
            self._cache = PagedCache(num_blocks, block_size, device=device)
            return
        self._cache = PagedCache(num_blocks + 1, block_size, device=device)
        rows = min(self.config.max_rows, num_blocks * block_size)
        self._graphs = DecodeGraphs(model, self._cache, max_rows=rows, capture=self.capture)

    def keep_alive(self) -> None:
        """Does nothing; ranks that wait for the next call hear that there are more to come."""

    def encode(self, pixels: Tensor) -> Tensor | None:
        """Features [n, V, C] of images [n, 3, h, w]; None where the vision tower is not."""
        tower = self.model.vision_tower
        if tower is None:
            return None
        features: Tensor = tower(pixels.to(self.device, self.model.config.params_dtype))
        return features

    def image_rows(
        self,
        features: Tensor | None,
        sources: Sequence[Tensor],
        guidance_ids: Tensor,
        lengths: Sequence[int],
        override: RoutingOverride | None,
    ) -> tuple[list[Tensor] | None, RoutingOutput | None]:
        """See `PictureModel.image_rows`; every rank gets the routes."""
        model = self.model
        if not model.pre_process:
            return None, share_routes(None, model)
        assert features is not None, "the first stage has the features"
        ends = torch.tensor(lengths).cumsum(0)
        batch = self._guided_images(
            features, guidance_ids, ends - torch.tensor(lengths), ends, torch.cat(list(sources))
        )
        made, routing = model.bridge.encode_images(model.decoder, batch, [len(own) for own in sources], override)
        return made, share_routes(routing, model)

    def guidance_weights(self, features: Tensor | None, guidance_ids: Tensor) -> Tensor | None:
        """See `PictureModel.guidance_weights`."""
        model = self.model
        if not model.pre_process:
            return None
        assert features is not None, "the first stage has the features"
        starts = torch.zeros(len(features), dtype=torch.int64)
        batch = self._guided_images(features, guidance_ids, starts, starts + len(guidance_ids), starts[:0])
        weights = model.bridge.guidance_weights(model.decoder, batch)
        return None if weights is None else weights.cpu()

    def _guided_images(
        self, features: Tensor, guidance_ids: Tensor, starts: Tensor, ends: Tensor, source: Tensor
    ) -> PackedBatch:
        """Images with the texts that guide their routes, and no other rows.

        Args:
            features: [n, V, C].
            guidance_ids: int64 [G], all texts.
            starts, ends: int64 [n], rows of each image's text.
            source: int64 [R], see `PackedBatch.visual_source`; NEWLINE for rows that are no image's.
        """
        device = self.device
        rows = torch.arange(len(guidance_ids), device=device)
        none, num_rows = rows[:0], len(features) * self.rows_per_image
        return PackedBatch(
            input_ids=guidance_ids.to(device),
            labels=torch.full_like(rows, IGNORE_ID),
            label_rows=none,
            position_ids=rows,
            cu_seqlens=torch.tensor([0, len(rows)], dtype=torch.int32, device=device),
            max_seqlen=len(rows),
            visual_rows=none,
            visual_source=torch.where(source == NEWLINE, num_rows, source).to(device),
            guidance_rows=rows,
            guidance_start=starts.int().to(device),
            guidance_end=ends.int().to(device),
            image_sample=torch.zeros(len(features), dtype=torch.int64, device=device),
            image_features=features.to(device),
        )

    def run_step(self, inputs: StepInputs) -> Tensor:
        """See `ModelRunner.run_step`; every rank gets the logits."""
        if self._graphs is not None and self._graphs.takes(inputs):
            return self._graphs.run(inputs)
        device = self.device
        if self._last is not None and self._last[0].bounds is inputs.bounds:
            batch, paged, logits_rows = self._next(inputs, device)
        else:
            batch, paged = self._batch(inputs, device), self._paged(inputs, device)
            logits_rows = inputs.logits_rows.to(device)
        self._last = inputs, batch, paged, logits_rows
        output = forward_logits(self.model, batch, logits_rows=logits_rows, paged=paged)
        assert output.logits is not None, "logits come back to every rank"
        return output.logits.float()

    def _next(self, inputs: StepInputs, device: torch.device) -> tuple[PackedBatch, PagedRows, Tensor]:
        """A step with the answers of the last one, a row each: what stays is not made again."""
        assert self._last is not None, "there was a step before"
        _, batch, paged, logits_rows = self._last
        size, tables = paged.cache.block_size, inputs.block_tables.view(len(paged.lengths), -1)
        batch = replace(batch, input_ids=inputs.input_ids.to(device), position_ids=inputs.position_ids.to(device))
        paged = replace(
            paged,
            blocks=tables.gather(1, (inputs.position_ids // size)[:, None]).squeeze(1).to(device),
            offsets=(inputs.position_ids % size).to(device),
            block_tables=tables.int().to(device),
            lengths=inputs.lengths.int().to(device),
            fresh=False,
        )
        return batch, paged, logits_rows

    def run_whole(self, inputs: StepInputs) -> Tensor:
        """See `ModelRunner.run_whole`; every rank gets the logits."""
        device = self.device
        batch, logits_rows = self._batch(inputs, device), inputs.logits_rows.to(device)
        output = forward_logits(self.model, batch, logits_rows=logits_rows)
        assert output.logits is not None, "logits come back to every rank"
        return output.logits.float()

    def _paged(self, inputs: StepInputs, device: torch.device) -> PagedRows:
        assert self._cache is not None, "the cache is opened before the first step"
        size, requests = self._cache.block_size, inputs.lengths.numel()
        tables, has_images = inputs.block_tables.view(requests, -1), inputs.has_images.bool()
        per_row = tables, has_images
        if inputs.input_ids.numel() > requests:
            request = torch.repeat_interleave(inputs.bounds.diff())
            per_row = tables.index_select(0, request), has_images.index_select(0, request)
        blocks = per_row[0].gather(1, (inputs.position_ids // size)[:, None]).squeeze(1)
        return PagedRows(
            cache=self._cache,
            blocks=blocks.to(device),
            offsets=(inputs.position_ids % size).to(device),
            block_tables=tables.int().to(device),
            lengths=inputs.lengths.int().to(device),
            has_images=per_row[1].to(device),
            image_of_row=inputs.image_of_row.to(device),
            fresh=not bool(inputs.position_ids[inputs.bounds[:-1]].any()),
            any_images=bool(has_images.any()),
        )

    def _batch(self, inputs: StepInputs, device: torch.device) -> PackedBatch:
        none = inputs.bounds[:0].to(device)
        spans = torch.zeros(len(inputs.image_sample), dtype=torch.int32, device=device)
        return PackedBatch(
            input_ids=inputs.input_ids.to(device),
            labels=torch.full_like(inputs.input_ids, IGNORE_ID).to(device),
            label_rows=none,
            position_ids=inputs.position_ids.to(device),
            cu_seqlens=inputs.bounds.int().to(device),
            max_seqlen=int(inputs.bounds.diff().max()),
            visual_rows=inputs.visual_rows.to(device),
            visual_source=inputs.visual_source.to(device),
            guidance_rows=none,
            guidance_start=spans,
            guidance_end=spans,
            image_sample=inputs.image_sample.to(device),
            image_rows=None if inputs.image_rows is None else inputs.image_rows.to(device),
        )
