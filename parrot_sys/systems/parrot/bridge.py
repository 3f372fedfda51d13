"""Parrot on Megatron: text-guided experts turn an image's projected rows before they take its place in the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.bridge import PreparedStep
from parrot_sys.megatron.experts import expert_groups, mark_experts, sharded_experts
from parrot_sys.modules.routing_losses import RoutingTotals, gather_routing_rows
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride, TextGuidedMoE
from parrot_sys.systems.bridge import ImageRowsBridge

EXPERTS = "moe"
"""Part of router and experts, and their name in the model."""


class ParrotBridge(ImageRowsBridge):
    """Tower -> projector -> text-guided experts -> rows of the decoder (arXiv 2406.02539, section 3)."""

    moe: TextGuidedMoE | None = None

    def build(self) -> None:
        """Makes the projector, and router and experts where there are any."""
        super().build()
        if self.model.moe.num_experts:
            self.moe = TextGuidedMoE(
                self.model.moe,
                self.model.llm.hidden_size,
                dtype=self.config.params_dtype,
                statistics_group=self.groups.dp_cp,
                groups=expert_groups(self.groups),
            )
            mark_experts(self.moe, self.groups)

    def modules(self) -> Mapping[str, nn.Module | None]:
        """The projector, and router and experts where there are any."""
        return {**super().modules(), EXPERTS: self.moe}

    def sharded_state(self, prefix: str) -> dict[str, Any]:
        """Parts of projector and experts."""
        experts = {} if self.moe is None else sharded_experts(self.moe, f"{prefix}{EXPERTS}.", self.groups)
        return super().sharded_state(prefix) | experts

    @property
    def active(self) -> TextGuidedMoE | None:
        """Router and experts, unless they are passed by."""
        return None if EXPERTS in self.bypass else self.moe

    @property
    def num_routed_experts(self) -> int:
        """Experts among which the prompt chooses; 0 where they are passed by."""
        return 0 if EXPERTS in self.bypass else self.model.moe.num_experts

    @property
    def wanted_by_others(self) -> bool:
        """Whether experts of this rank may get images of others."""
        return self.active is not None and self.active.needs_other_ranks

    def route(
        self, features: Tensor, embeddings: Tensor, batch: PackedBatch, override: RoutingOverride | None
    ) -> tuple[Tensor, RoutingOutput | None]:
        """Rows [n, V, H] after the experts that the prompt chooses, and the routes."""
        if self.active is None:
            return features, None
        text = embeddings.index_select(0, batch.guidance_rows)
        # (Only training has a use for the languages, and a copy to the device is not free.)
        wanted = self.model.moe.information_coeff and torch.is_grad_enabled()
        routed, routing = self.active(
            features,
            text,
            batch.guidance_start,
            batch.guidance_end,
            languages=batch.image_languages() if wanted else None,
            override=override,
        )
        return routed, routing

    def guidance_weights(self, decoder: Any, batch: PackedBatch) -> Tensor | None:
        """Weights of the prompt's words in what the router sees; None where the experts are passed by."""
        if self.active is None:
            return None
        assert self.projector is not None, "the stage with the experts holds the projector"
        cls_rows = self.projector(self.image_features(batch)[:, 0])
        return self.active.attention(cls_rows, decoder.embed(batch.input_ids))

    def start_step(self, step: int) -> None:
        """The schedule of the router's scale."""
        if self.active is not None:
            self.active.start_step(step)

    def finish_step(self, *, updated: bool) -> None:
        """The experts' bias follows what the images chose."""
        if self.active is not None:
            self.active.finish_step(updated=updated)

    @torch.no_grad()
    def prepare_step(self, decoder: Any, batches: Sequence[PackedBatch], group: ProcessGroup) -> PreparedStep | None:
        """Statistics over all images of the step, where the auxiliary losses need them.

        The share of images that chose an expert, or the mean scores, multiply the gradient of every micro-batch, so
        they have to be known before the first backward pass. Where that takes a look at the routes
        (`TextGuidedMoEConfig.needs_routes_ahead`), the router runs once without gradients on the CLS rows. Features of
        a frozen vision tower stay in the micro-batches, so that it runs once; a trainable tower runs forward twice.
        """
        moe = self.active
        if moe is None or not moe.config.has_losses:
            return None
        num_experts, device = moe.config.num_experts, moe.router_weight.device
        batches = list(batches)
        if not moe.config.needs_routes_ahead:
            images = torch.tensor(float(sum(batch.num_images for batch in batches)), device=device)
            dist.all_reduce(images, group=group)
            return PreparedStep(batches=batches, active=moe.over_step(RoutingTotals.of_dense(images, num_experts)))
        rows = [torch.empty((0, 1 + 2 * num_experts), dtype=torch.float64, device=device)]
        frozen = self.tower is None or not any(p.requires_grad for p in self.tower.parameters())
        for index, batch in enumerate(batches):
            if not batch.num_images:
                continue
            features = self.image_features(batch)
            if frozen:
                batches[index] = dataclasses.replace(batch, pixel_values=None, image_features=features)
            assert self.projector is not None, "the stage with the experts holds the projector"
            text = decoder.embed(batch.input_ids.index_select(0, batch.guidance_rows))
            spans = (batch.guidance_start, batch.guidance_end)
            rows.append(moe.look(self.projector(features[:, 0]), text, *spans, batch.image_languages()))
        totals = RoutingTotals.of(gather_routing_rows(torch.cat(rows), group))
        return PreparedStep(batches=batches, active=moe.over_step(totals))
