"""Bridges that know the whole configuration: of any system, and of systems that put image rows into the text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.bridge import Bridge, Embedded
from parrot_sys.megatron.experts import mark_projector, multi_rank_group, sharded_projector
from parrot_sys.modules.projector import Projector
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.parallel import all_gather_rows
from parrot_sys.systems.config import ParrotConfig


class SystemBridge(Bridge):
    """Base of the bridges of all systems."""

    def __init__(
        self,
        model: ParrotConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        bypass: Collection[str] = (),
    ) -> None:
        """
        Args:
            model: sizes and options.
            config, groups, pre_process, bypass: see `Bridge`.
        """
        super().__init__(model.llm, model.vision, config, groups, pre_process=pre_process, bypass=bypass)
        self.model = model
        if pre_process:
            self.build()

    def build(self) -> None:
        """Makes the modules of the first pipeline stage; on other stages they stay None."""


class ImageRowsBridge(SystemBridge):
    """The tower's rows go through a projector and take the places of the image markers among the rows of the text."""

    projector: Projector | None = None

    def build(self) -> None:
        """Makes the projector."""
        model = self.model
        self.projector = Projector(
            model.projector,
            model.vision.hidden_size,
            model.llm.hidden_size,
            dtype=self.config.params_dtype,
            group=multi_rank_group(self.groups.tp),
        )
        mark_projector(self.projector)

    def modules(self) -> Mapping[str, nn.Module | None]:
        """The projector."""
        return {"projector": self.projector}

    def sharded_state(self, prefix: str) -> dict[str, Any]:
        """Parts of the projector."""
        return {} if self.projector is None else sharded_projector(self.projector, f"{prefix}projector.", self.groups)

    @property
    def wanted_by_others(self) -> bool:
        """Whether images of other ranks may come here, so that a rank without any has to take part as well."""
        return False

    def encode_images(
        self, decoder: Any, batch: PackedBatch, counts: Sequence[int], override: RoutingOverride | None
    ) -> tuple[list[Tensor], RoutingOutput | None]:
        """See `Bridge.encode_images`."""
        assert self.projector is not None, "the first stage holds the projector"
        features = self.projector(self.image_features(batch))
        features, routing = self.route(features, decoder.embed(batch.input_ids), batch, override)
        rows = self.image_rows(features).index_select(0, batch.visual_source)
        return list(rows.split(list(counts))), routing

    def route(
        self, features: Tensor, embeddings: Tensor, batch: PackedBatch, override: RoutingOverride | None
    ) -> tuple[Tensor, RoutingOutput | None]:
        """Projected rows of the images [n, V, H] as the decoder gets them, and their routes.

        Args:
            features: [n, V, H].
            embeddings: [T, H] of the words, places of images unset.
            batch: micro-batch.
            override: replaces the routes.
        """
        return features, None

    def image_rows(self, features: Tensor) -> Tensor:
        """Rows [R, H] that `visual_source` of a batch counts, from those of all images [n, V, H]."""
        return features.flatten(0, 1)

    def embed(
        self,
        decoder: Any,
        batch: PackedBatch,
        plan: MemoryPlan | None,
        override: RoutingOverride | None,
        *,
        paged: bool,
    ) -> Embedded:
        """See `Bridge.embed`."""
        embeddings = decoder.embed(batch.input_ids)
        if batch.image_rows is not None:
            visual = batch.image_rows.index_select(0, batch.visual_source)
            return Embedded(rows=embeddings.index_copy(0, batch.visual_rows, visual.to(embeddings.dtype)))
        all_images = batch.num_images if batch.context is None else sum(batch.context.image_counts)
        if all_images == 0 and not torch.is_grad_enabled() and not (self.wanted_by_others and not paged):
            return Embedded(rows=embeddings)
        # In training the same modules run with zero rows when there is no image: every parameter hook fires everywhere.
        # So they do whenever the experts of this rank may be wanted by another.
        assert self.projector is not None, "the first stage holds the projector"
        features = self.projector(self.image_features(batch))  # [n, V, H]
        features, routing = self.route(features, embeddings, batch, override)
        if batch.context is not None:
            # Each rank has routed its own images; any rank may hold rows of any image.
            features = all_gather_rows(features, batch.context.image_counts, self.groups.cp)
        visual = self.image_rows(features).index_select(0, batch.visual_source)
        return Embedded(rows=embeddings.index_copy(0, batch.visual_rows, visual), routing=routing)
