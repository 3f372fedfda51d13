"""Costs of systems that put projected rows of images among those of the text.

n images of V rows, R visual rows of a micro-batch, C width of the tower, H hidden_size, b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Weight, Work, message
from parrot_sys.systems.system_costs import SystemCosts

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job, MicroBatch


class ImageRowsCosts(SystemCosts):
    """A projector, and its rows in their places."""

    def image_costs(self, model: ParrotConfig, bypass: Collection[str]) -> list[Cost]:
        """Projector: 2 V H (C + (depth - 1) H) for each image."""
        hidden = model.llm.hidden_size
        row = 2 * hidden * (model.vision.hidden_size + (model.projector.depth - 1) * hidden)
        return [Cost(part="projector", image=model.vision.num_visual_rows * row)]

    def image_work(self, job: Job, layout: Layout, batch: MicroBatch) -> dict[str, Work]:
        """The projector: pairs of layers are cut, a last one without a partner is not."""
        model, size = job.model, job.model.llm.hidden_size
        (projector, *_) = self.image_costs(model, job.bypass)
        whole = model.projector.depth - _cut_layers(model)
        width = size if model.projector.depth > 1 else model.vision.hidden_size
        last = 2 * model.vision.num_visual_rows * size * width * whole
        forward = batch.images * (last + (projector.image - last) / layout.tensor)
        return {"projector": Work(1, job.backward("projector")) * forward}

    def input_learns(self, job: Job) -> bool:
        """Whether tower, projector or what is after it learns."""
        return job.learns("vision", *(cost.part for cost in self.image_costs(job.model, job.bypass)))

    def tensor_sizes(self, model: ParrotConfig) -> Mapping[str, int]:
        """Width between two layers of the projector."""
        return {"llm.hidden_size": model.llm.hidden_size} if _cut_layers(model) else {}

    def features_learn(self, job: Job) -> bool:
        """Whether a gradient comes back to the rows of images before they are put in place."""
        return self.input_learns(job)

    def weights(self, model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
        """Projector."""
        size = model.llm.hidden_size
        for layer in range(model.projector.depth):
            parts = layout.tensor if layer < _cut_layers(model) else 1
            yield Weight("projector", (model.vision.hidden_size if layer == 0 else size) * size // parts)
            # Second layers of a pair are cut by their inputs.
            yield Weight("projector", size // parts if layer % 2 == 0 else size)

    def first_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Projector, and the places of its rows.

        Context-parallel ranks share the images out, and each puts all of them in place.
        """
        model, b = job.model, job.bytes
        size, visual = model.llm.hidden_size, layout.local_images(batch.images) * model.vision.num_visual_rows
        learns, total = job.learns("projector"), 0.0
        if learns:
            total += b * visual * model.vision.hidden_size
        if job.learns("vision", "projector"):
            # After each layer but the last: what the activation takes, and what it gives to a layer that learns.
            cut = _cut_layers(model) // 2
            widths = size * (cut / layout.tensor + model.projector.depth - 1 - cut)
            total += b * visual * widths * (2 if learns else 1)
        if job.rows_learn[0]:
            # Putting visual rows in place keeps them, and two indices.
            total += batch.visual_rows * (b * size + 16)
        return total

    def first_messages(self, job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
        """Two layers of the projector share one sum; context-parallel ranks gather all images."""
        vision, size = job.model.vision, layout.tensor
        images = layout.local_images(batch.images)
        row = job.bytes * job.model.llm.hidden_size
        visual = images * vision.num_visual_rows
        for first in range(0, _cut_layers(job.model), 2) if size > 1 else ():
            yield message("tensor", "all_reduce", visual * row, 1, size)
            if first and job.learns("vision", "projector"):
                yield message("tensor", "all_reduce", visual * row, 1, size, backward=True)
            if not first and job.learns("vision"):
                payload = job.bytes * visual * vision.hidden_size
                yield message("tensor", "all_reduce", payload, 1, size, backward=True)
        if layout.context > 1 and batch.images:
            features = layout.context * visual * row
            yield message("context", "all_gather", features, 1, layout.context)
            if self.features_learn(job):
                yield message("context", "reduce_scatter", features, 1, layout.context, backward=True)


def _cut_layers(model: ParrotConfig) -> int:
    """The projector's layers that tensor-parallel ranks share: pairs, from the first on."""
    return model.projector.depth // 2 * 2
