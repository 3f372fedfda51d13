"""Wings on Megatron: learners beside each layer's attention read the projected images and the words of the sample."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from parrot_sys.data.batch import PackedBatch
from parrot_sys.errors import DataError
from parrot_sys.megatron.attention.memory import MemoryPlan
from parrot_sys.megatron.attention.paged import PagedRows
from parrot_sys.megatron.bridge import Embedded
from parrot_sys.megatron.embed.learner_layers import with_learners
from parrot_sys.megatron.embed.learner_memory import LearnerPlan, gather_memory
from parrot_sys.modules.text_guided_moe import RoutingOverride
from parrot_sys.systems.bridge import ImageRowsBridge
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.systems.wings.plan import plan_memory

TEXTUAL_LEARNERS = "textual_learners"
"""Part of textual learners and routers, which the first stage passes by."""


class WingsBridge(ImageRowsBridge):
    """Image rows among the text, and the learners' memory of them and of the words (arXiv 2406.03496)."""

    @property
    def wings(self) -> WingsConfig:
        """Settings of the learners."""
        assert self.model.wings is not None, "the registry chose this bridge"
        return self.model.wings

    @property
    def takes_cache(self) -> bool:
        """Whether a KV cache can be used: under the released rule earlier rows read later ones."""
        return self.wings.rule == "paper"

    @property
    def layers_differ(self) -> bool:
        """Whether only some layers have learners."""
        return self.wings.layers is not None

    @property
    def steps_alike(self) -> bool:
        """No: what the layers read besides their rows is planned for each step."""
        return False

    def layer_spec(self, spec: ModuleSpec, number: int) -> ModuleSpec:
        """The layer with learners, where the settings want them."""
        return with_learners(spec, self.wings, rope_base=self.llm.rope_base)

    def plan(
        self,
        batch: PackedBatch,
        paged: PagedRows | None = None,
        *,
        output_router_weights: bool = False,
    ) -> MemoryPlan | None:
        """See `Bridge.plan`."""
        return plan_memory(
            batch,
            self.wings,
            width=self.llm.hidden_size,
            rows_per_image=self.model.rows_per_image,
            routed=TEXTUAL_LEARNERS not in self.bypass,
            paged=paged,
            weights={} if output_router_weights else None,
        )

    def embed(
        self,
        decoder: Any,
        batch: PackedBatch,
        plan: MemoryPlan | None,
        override: RoutingOverride | None,
        *,
        paged: bool,
    ) -> Embedded:
        """Rows with images in place, and the memory that the learners read."""
        assert isinstance(plan, LearnerPlan), "the plan is that of a model with learners"
        embedded = super().embed(decoder, batch, plan, override, paged=paged)
        memory = gather_memory(embedded.rows, plan, self._blank_rows() if plan.needs_blank else None)
        return Embedded(rows=embedded.rows, memory=memory, routing=embedded.routing)

    def router_weights(self, plan: MemoryPlan | None) -> dict[int, Tensor] | None:
        """Weights of visual and textual learners that the routers chose, of this rank's layers and rows."""
        assert isinstance(plan, LearnerPlan), "the plan is that of a model with learners"
        return plan.weights

    def _blank_rows(self) -> Tensor:
        """[V, H], projected rows of an all-zero image."""
        if self.tower is None:
            raise DataError("the released rule of Wings needs the vision tower for text among images, got none")
        assert self.projector is not None, "the first stage holds the projector"
        side, dtype = self.vision.image_size, self.config.params_dtype
        device = next(self.projector.parameters()).device
        pixels = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
        rows: Tensor = self.projector(self.tower(pixels).to(dtype))
        return rows[0]
