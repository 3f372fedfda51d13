"""Bridge: what a system adds around and inside the decoder, as `MultimodalModel` sees it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import DataError
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride
from parrot_sys.towers import VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """Input of the decoder, on the first pipeline stage."""

    rows: Tensor
    """[T, H], images in place."""
    memory: Tensor | None = None
    """[M, W], whole on each tensor-parallel rank."""
    routing: RoutingOutput | None = None
    """Routes of the images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStep:
    """A step whose statistics over all of its micro-batches are known before the first backward pass."""

    batches: list[PackedBatch]
    """The micro-batches to train on; work done for the statistics is kept in them."""
    active: AbstractContextManager[None]
    """Within it, auxiliary losses are shares of those of the whole step."""


class Bridge:
    """Base of the bridges, one for each part of a model (`build_chunks`): a decoder that reads text alone.

    `modules` are registered in the model under their names, on its first pipeline stage.
    """

    def __init__(
        self,
        llm: LLMConfig,
        vision: VisionConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        bypass: Collection[str] = (),
    ) -> None:
        """
        Args:
            llm: decoder.
            vision: vision tower.
            config: of the decoder's layers.
            groups: process groups.
            pre_process: this part of the model is the first.
            bypass: parts of the system that are kept as they are, and passed by.
        """
        self.llm = llm
        self.vision = vision
        self.config = config
        self.groups = groups
        self.pre_process = pre_process
        self.bypass = frozenset(bypass)
        self.tower: nn.Module | None = None

    @property
    def takes_cache(self) -> bool:
        """Whether a KV cache can be used: not where earlier rows read later ones."""
        return True

    @property
    def steps_alike(self) -> bool:
        """Whether a step of answers makes the same calls whatever its requests hold, so that it can be recorded."""
        return True

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have parts that others lack."""
        return False

    @property
    def num_routed_experts(self) -> int:
        """Experts among which images are routed; 0 where no image is."""
        return 0

    def modules(self) -> Mapping[str, nn.Module | None]:
        """Name in the model -> module that the system adds to the first pipeline stage."""
        return {}

    def layer_spec(self, spec: ModuleSpec, number: int) -> ModuleSpec:
        """A decoder layer with what the system adds to it.

        Args:
            spec: of the layer alone.
            number: of the layer in the whole model, from 1.
        """
        return spec

    def plan(
        self,
        batch: PackedBatch,
        paged: PagedRows | None = None,
        *,
        output_router_weights: bool = False,
    ) -> MemoryPlan | None:
        """Memory that the layers read besides their rows, on every pipeline stage; None where they read nothing else.

        Args:
            batch: whole micro-batch, or one rank's share under context parallelism.
            paged: places of the rows, where keys and values are in a paged cache.
            output_router_weights: keep what the routers inside the layers decide, for `router_weights`.

        Raises:
            ConfigError, DataError: batch and model do not fit together.
        """
        return None

    def image_readers(self, places: Sequence[range]) -> list[range]:
        """Rows of a request whose keys and values depend directly on each of its pictures: those that hold it, or that
        read it.

        Args:
            places: rows that take the place of each picture, ascending.
        """
        return list(places)

    def encode_images(
        self, decoder: Any, batch: PackedBatch, counts: Sequence[int], override: RoutingOverride | None
    ) -> tuple[list[Tensor], RoutingOutput | None]:
        """Rows [R', W] that the decoder gets of each picture, and the routes of images; on the first pipeline stage.

        Args:
            decoder: has the word embeddings.
            batch: images, sources of the rows of their pictures, and the text that guides their routes.
            counts: rows that take the place of each picture.
            override: replaces the routes.

        Raises:
            DataError: the model reads text alone.
        """
        raise DataError("the model reads text alone, got images")

    def guidance_weights(self, decoder: Any, batch: PackedBatch) -> Tensor | None:
        """Weights float32 [n, G] of a guiding text's rows in what the router sees of it for each image; on the first
        pipeline stage. None where no text guides routes.

        Args:
            decoder: has the word embeddings.
            batch: images, and one text that guides all of their routes.
        """
        return None

    def embed(
        self,
        decoder: Any,
        batch: PackedBatch,
        plan: MemoryPlan | None,
        override: RoutingOverride | None,
        *,
        paged: bool,
    ) -> Embedded:
        """Input of the decoder, on the first pipeline stage.

        Args:
            decoder: has the word embeddings.
            batch: micro-batch.
            plan: from `plan`.
            override: replaces the routes of the images.
            paged: the rows are those of a step over a paged cache, whose images were encoded before.
        """
        return Embedded(rows=decoder.embed(batch.input_ids))

    def router_weights(self, plan: MemoryPlan | None) -> dict[int, Tensor] | None:
        """Decisions of the routers inside this rank's layers: number of the layer, from 1 -> float32 [T, 2].

        None where the layers have no routers, or were not asked.
        """
        return None

    def sharded_state(self, prefix: str) -> dict[str, Any]:
        """Entries of the sharded state of `modules` that Megatron cannot tell by itself (parts of tensors)."""
        return {}

    def prepare_step(self, decoder: Any, batches: Sequence[PackedBatch], group: ProcessGroup) -> PreparedStep | None:
        """Statistics over all micro-batches of a training step, where auxiliary losses need them; else None.

        Args:
            decoder: has the word embeddings.
            batches: micro-batches of this rank.
            group: ranks with copies of the model.
        """
        return None

    def start_step(self, step: int) -> None:
        """Called before each training step, with its number in the run, counted from 0."""

    def finish_step(self, *, updated: bool) -> None:
        """Called after each training step on every rank, with whether the parameters were updated."""

    def image_features(self, batch: PackedBatch) -> Tensor:
        """[n, V, C] from the tower, or as cached; the first pipeline stage has them.

        Raises:
            DataError: there are pixel values and no tower, or cached features and a tower that learns.
        """
        vision, dtype = self.vision, self.config.params_dtype
        learns = self.tower is not None and any(p.requires_grad for p in self.tower.parameters())
        trainable = learns and torch.is_grad_enabled()
        if batch.image_features is not None:
            if trainable:
                raise DataError(
                    "the batch holds cached image features, which cannot train the vision tower: give pixel values"
                )
            return batch.image_features.to(dtype)
        if batch.num_images == 0 and not trainable:
            return batch.input_ids.new_empty((0, vision.num_visual_rows, vision.hidden_size), dtype=dtype)
        if self.tower is None:
            raise DataError("the batch holds pixel values, but the model was built without its vision tower")
        pixels = batch.pixel_values
        if pixels is None:
            pixels = batch.input_ids.new_empty((0, 3, vision.image_size, vision.image_size), dtype=dtype)
        with torch.set_grad_enabled(trainable):
            return self.tower(pixels.to(dtype)).to(dtype)
