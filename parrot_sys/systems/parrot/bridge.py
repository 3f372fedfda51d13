"""Parrot on Megatron: text-guided experts turn an image's projected rows before they take its place in the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parrot_sys.data.batch import PackedBatch
from parrot_sys.megatron.bridge import PreparedStep
from parrot_sys.megatron.experts import expert_groups, mark_experts, sharded_experts
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride, RoutingTotals, TextGuidedMoE
from parrot_sys.systems.bridge import ImageRowsBridge
from parrot_sys.systems.config import ParrotConfig

EXPERTS = "moe"
"""Part of router and experts, and their name in the model."""


class ParrotBridge(ImageRowsBridge):
    """Tower -> projector -> text-guided experts -> rows of the decoder (arXiv 2406.02539, section 3)."""

    def __init__(
        self,
        model: ParrotConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        bypass: Collection[str] = (),
    ) -> None:
        """See `SystemBridge`."""
        super().__init__(model, config, groups, pre_process=pre_process, bypass=bypass)
        self.moe: TextGuidedMoE | None = None
        if pre_process and model.moe.num_experts:
            self.moe = TextGuidedMoE(
                model.moe,
                model.llm.hidden_size,
                dtype=config.params_dtype,
                statistics_group=groups.dp_cp,
                groups=expert_groups(groups),
            )
            mark_experts(self.moe, groups)

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
        routed, routing = self.active(features, text, batch.guidance_start, batch.guidance_end, override=override)
        return routed, routing

    @torch.no_grad()
    def prepare_step(self, decoder: Any, batches: Sequence[PackedBatch], group: ProcessGroup) -> PreparedStep | None:
        """Counts over all images of the step, where the auxiliary losses need them.

        The share of images that chose an expert multiplies the gradient of every micro-batch, so it has to be known
        before the first backward pass. Only top-k routing with a load-balancing loss has to look (the number of images
        is known, and dense routing always chooses every expert): it runs the router once without gradients on the CLS
        rows. Features of a frozen vision tower stay in the micro-batches, so that it runs once; a trainable tower runs
        forward twice.
        """
        moe = self.active
        if moe is None or not (moe.config.aux_loss_coeff or moe.config.z_loss_coeff):
            return None
        images = sum(batch.num_images for batch in batches)
        counts = torch.full((moe.config.num_experts,), images, dtype=torch.int64, device=moe.router_weight.device)
        batches = list(batches)
        if moe.config.aux_loss_coeff and moe.config.routing == "topk":
            counts.zero_()
            frozen = self.tower is None or not any(p.requires_grad for p in self.tower.parameters())
            for index, batch in enumerate(batches):
                if not batch.num_images:
                    continue
                features = self.image_features(batch)
                if frozen:
                    batches[index] = dataclasses.replace(batch, pixel_values=None, image_features=features)
                assert self.projector is not None, "the stage with the experts holds the projector"
                text = decoder.embed(batch.input_ids.index_select(0, batch.guidance_rows))
                cls_rows = self.projector(features[:, 0])
                counts += moe.count_choices(cls_rows, text, batch.guidance_start, batch.guidance_end)
        sums = torch.cat((counts, counts.new_tensor([images])))
        dist.all_reduce(sums, group=group)
        totals = RoutingTotals(num_images=sums[-1], tokens_per_expert=sums[:-1])
        return PreparedStep(batches=batches, active=moe.over_step(totals))
