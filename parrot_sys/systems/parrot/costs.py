"""Costs of Parrot: projector, router and experts, and the ways of images to their experts.

n images of V rows, H hidden_size, I inner width of an expert, b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from parrot_sys.systems.balance import expected_imbalance
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Operation, Weight, Work, message
from parrot_sys.systems.image_rows_costs import ImageRowsCosts
from parrot_sys.systems.parrot.dispatch import Dispatch

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job, MicroBatch

EXPERTS = "moe"
"""Part of router and experts."""


class ParrotCosts(ImageRowsCosts):
    """Projector, and text-guided experts unless they are passed by."""

    def image_costs(self, model: ParrotConfig, bypass: Collection[str]) -> list[Cost]:
        """Projector, and 6 V H I for each expert that works on an image: all of them in dense routing."""
        costs = super().image_costs(model, bypass)
        if _active(model, bypass):
            row = 6 * model.llm.hidden_size * model.moe.ffn_hidden_size * _chosen(model)
            costs.append(Cost(part=EXPERTS, image=model.vision.num_visual_rows * row))
        return costs

    def image_work(self, job: Job, layout: Layout, batch: MicroBatch) -> dict[str, Work]:
        """Projector and experts; under expert parallelism the rank with the most images decides."""
        work, moe = super().image_work(job, layout, batch), job.model.moe
        if _active(job.model, job.bypass):
            sent = Dispatch.of(moe, layout, batch.images)
            once = sent.worth * self.image_costs(job.model, job.bypass)[-1].image
            if moe.routing == "topk":
                once *= expected_imbalance(layout.expert, sent.own * layout.expert * layout.expert_tensor * moe.topk)
            # With `recompute` the up-projection, two of the three matrices, runs again.
            again = 2 / 3 if moe.recompute and self.features_learn(job) else 0.0
            # The scores of the router come from the word embeddings, which belong to the decoder.
            back = max(job.backward(EXPERTS), int(self.features_learn(job)))
            work["experts"] = Work(1, back + again) * once
        return work

    def features_learn(self, job: Job) -> bool:
        """Whether tower, projector or experts learn, or the words that guide the routes."""
        return self.input_learns(job) or (_active(job.model, job.bypass) and job.learns("llm"))

    def expert_sizes(self, model: ParrotConfig) -> Mapping[str, tuple[int, int]]:
        """Text-guided experts, besides those of the decoder's layers."""
        own = {EXPERTS: (model.moe.num_experts, model.moe.ffn_hidden_size)} if model.moe.num_experts else {}
        return {**own, **super().expert_sizes(model)}

    def weights(self, model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
        """Projector, router and experts."""
        yield from super().weights(model, layout)
        moe, size = model.moe, model.llm.hidden_size
        if moe.num_experts:
            inner = moe.num_experts // layout.expert * moe.ffn_hidden_size // layout.expert_tensor
            apart = layout.expert * layout.expert_tensor != layout.tensor
            yield Weight(EXPERTS, moe.num_experts * size)
            yield Weight(EXPERTS, 2 * inner * size, routed=apart)
            yield Weight(EXPERTS, inner * size, routed=apart)

    def first_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Projector, experts, and the guiding words of the router."""
        total = super().first_bytes(job, layout, batch)
        if _active(job.model, job.bypass) and self.features_learn(job):
            total += expert_bytes(job, layout, batch)
            words = job.bytes * job.model.llm.hidden_size + (8 if job.learns("llm") else 0)
            total += batch.guidance_rows * words
        return total

    def working_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Gradients of the experts and of the images that are with them."""
        if not _active(job.model, job.bypass):
            return 0.0
        moe, sent = job.model.moe, Dispatch.of(job.model.moe, layout, layout.local_images(batch.images))
        inner = 3 * sent.worth * _chosen(job.model) * moe.ffn_hidden_size
        travelling = 2 * sent.arriving * job.model.llm.hidden_size if sent.way in ("gathered", "exchanged") else 0.0
        return job.bytes * job.model.vision.num_visual_rows * (inner + travelling)

    def first_messages(self, job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
        """Messages of the projector, and of images on the way to their experts."""
        yield from super().first_messages(job, layout, batch)
        if _active(job.model, job.bypass):
            yield from self._dispatch_messages(job, layout, batch)

    def _dispatch_messages(self, job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
        """Whole images and their weights to the ranks of their experts, the experts' sums back; also for gradients."""
        moe, way = job.model.moe, Dispatch.of(job.model.moe, layout, layout.local_images(batch.images))
        image = job.bytes * job.model.vision.num_visual_rows * job.model.llm.hidden_size
        routed = self.features_learn(job)
        # Bytes of what goes there, and whether its gradients come back.
        there = ((image, job.learns("vision", "projector")), (4 * moe.num_experts, routed))
        ranks = layout.expert * layout.expert_tensor
        if way.way == "in_place":
            yield message("experts", "all_reduce", image * way.images, 1, ranks)
            for size, learns in there:
                if learns:
                    yield message("experts", "all_reduce", size * way.images, 1, ranks, backward=True)
            return
        if layout.tensor > 1:  # the ranks split the images before, and gather the results after
            whole = way.own * layout.tensor
            yield message("tensor", "all_gather", image * whole, 1, layout.tensor)
            for size, learns in there:
                if learns:
                    yield message("tensor", "all_gather", size * whole, 1, layout.tensor, backward=True)
        if ranks == 1:
            return
        counts = 1 if way.way == "gathered" else 2 * layout.expert
        yield message("experts", "all_gather", 8 * counts * ranks, 1, ranks)
        for size, learns in there:
            yield from _travel(layout, way, size, there=True)
            if learns:
                yield from _travel(layout, way, size, there=False, backward=True)
        yield from _travel(layout, way, image, there=False)
        if routed:
            yield from _travel(layout, way, image, there=True, backward=True)


def _active(model: ParrotConfig, bypass: Collection[str]) -> bool:
    """Whether the experts run."""
    return model.moe.num_experts > 0 and EXPERTS not in bypass


def _chosen(model: ParrotConfig) -> int:
    """Experts that work on an image."""
    return model.moe.topk if model.moe.routing == "topk" else model.moe.num_experts


def expert_bytes(job: Job, layout: Layout, batch: MicroBatch) -> float:
    """X [n, V, H] and z [experts of an image, n, V, 2, I] (ops/expert_mlp.py); with `moe.recompute` X only.

    Where images travel, those that arrived are X, and the router keeps the rank's own; images sent to chosen ranks are
    kept once more when they are back, each copy of them (ops/permute.py).
    """
    moe, b = job.model.moe, job.bytes
    sent = Dispatch.of(moe, layout, layout.local_images(batch.images))
    held = sent.arriving
    if sent.way in ("gathered", "exchanged"):
        held += sent.images
    if sent.way == "exchanged":
        held += sent.sent
    z = 0.0 if moe.recompute else 2 * _chosen(job.model) * moe.ffn_hidden_size
    return b * job.model.vision.num_visual_rows * (held * job.model.llm.hidden_size + sent.worth * z)


def _travel(layout: Layout, way: Dispatch, size: float, *, there: bool, backward: bool = False) -> Iterator[Message]:
    """Cost of `size` bytes per image on the way to the experts, or of their sums on the way back."""
    operation: Operation = "all_gather" if there else "reduce_scatter"
    if way.way == "gathered":
        ranks = layout.expert * layout.expert_tensor
        yield message("experts", operation, size * way.arriving, 1, ranks, backward=backward)
        return
    yield message("expert", "all_to_all", size * way.sent, 1, layout.expert, backward=backward)
    if layout.expert_tensor > 1:
        slices = layout.expert_tensor
        yield message("expert_tensor", operation, size * way.arriving, 1, slices, backward=backward)
