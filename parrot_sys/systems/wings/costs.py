"""Costs of Wings: projector, and the learners with their routers inside the decoder's layers.

T rows of a micro-batch (T' on this rank), M rows of the memory, t tensor-parallel ranks, H hidden_size, n heads of
width d, r rank of the learners, P positions of a router, b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from typing import TYPE_CHECKING

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Weight, message
from parrot_sys.systems.image_rows_costs import ImageRowsCosts
from parrot_sys.systems.wings.config import WingsConfig

if TYPE_CHECKING:
    from parrot_sys.systems.layout import Layout
    from parrot_sys.systems.system_costs import Job, MicroBatch

VISUAL, TEXTUAL = "visual_learners", "textual_learners"
"""Parts: the visual learners; the textual ones with all routers."""


class WingsCosts(ImageRowsCosts):
    """Projector; two learners and a router in each layer that has them."""

    def layer_costs(self, model: ParrotConfig, bypass: Collection[str], layer: int) -> list[Cost]:
        """Learners; routers cost next to nothing.

        Both learners of a layer together see the rows that its own attention sees.
        """
        llm, wings = model.llm, _wings(model)
        if not wings.has_learners(layer):
            return []
        row = 2 * 8 * wings.rank * llm.hidden_size
        pair = 2 * llm.num_attention_heads * llm.kv_channels
        parts = _learners(bypass)
        return [Cost(part=part, row=row, pair=pair if part == VISUAL else 0) for part in parts]

    def layer_kind(self, model: ParrotConfig, layer: int) -> Hashable:
        """Layers with learners, and with experts."""
        return super().layer_kind(model, layer), _wings(model).has_learners(layer)

    def layer_learns(self, job: Job, layer: int) -> bool:
        """Whether there are learners that learn."""
        return _wings(job.model).has_learners(layer) and job.learns(*_learners(job.bypass))

    def asks_attention(self, job: Job, layer: int) -> bool:
        """True for the router."""
        return _wings(job.model).has_learners(layer) and _asks(job)

    def layer_weights(self, model: ParrotConfig, layout: Layout, layer: int) -> Iterator[Weight]:
        """Learners, whose heads are cut, and router; each rank uses the whole ones for its own heads or rows."""
        wings, hidden = _wings(model), model.llm.hidden_size
        if not wings.has_learners(layer):
            return
        low = wings.rank * hidden
        for part in (VISUAL, TEXTUAL):
            yield Weight(part, low, 4)  # down of queries, keys and values, up of the output
            yield Weight(part, low // layout.tensor, 4)
        yield Weight(TEXTUAL, 2 * wings.router_positions)
        yield Weight(TEXTUAL, 2)

    def memory(self, job: Job, batch: MicroBatch) -> tuple[float, int]:
        """Projected image rows and word embeddings, sample by sample: as many as the pack has rows.

        So it is under the rule of the public code too, where every sample has one image.
        """
        return batch.rows, job.model.llm.hidden_size

    def memory_learns(self, job: Job) -> bool:
        """Whether words or images learn: what the memory is made of."""
        return job.rows_learn[0]

    def first_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Projector, and the index by which the memory is gathered."""
        return super().first_bytes(job, layout, batch) + (8 * batch.rows if job.rows_learn[0] else 0)

    def chunk_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layers: Collection[int]) -> float:
        """The memory, and rotations of rows and memory, which all layers share."""
        if not any(self.layer_learns(job, layer) or job.rows_learn[layer] for layer in layers):
            return 0.0
        llm, b = job.model.llm, job.bytes
        learns = job.learns(*_learners(job.bypass)) or layout.recompute
        memory = b * batch.rows * llm.hidden_size if learns else 0.0
        if layout.recompute:
            return memory
        rows = layout.local_rows(batch.rows)
        return memory + b * llm.kv_channels * (rows + batch.rows) + 9 * rows

    def layer_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layer: int) -> float:
        """Learners and router of a layer.

        Rows once for all learners; per learner and row its low rank, query and output, log-sum-exp and bounds; per row
        of its memory two low ranks, key and value. Between the sum over the ranks and the blend: low ranks in float32,
        what the router makes of two numbers, and the two results that it weighs.
        """
        wings, llm, b, tensor = _wings(job.model), job.model.llm, job.bytes, layout.tensor
        if not wings.has_learners(layer):
            return 0.0
        rows, narrow = layout.rows_and_narrow(batch.rows)
        width, heads, rank = llm.hidden_size / tensor, llm.num_attention_heads / tensor, wings.rank
        parts = _learners(job.bypass)
        learning = [part for part in parts if job.learns(part)]
        kept = b * rows * llm.hidden_size if learning else 0.0
        kept += len(parts) * rows * (2 * b * width + 4 * heads + 8) + b * len(learning) * rows * rank
        # Images and words share the memory out: the visual learners see the former.
        kinds = {VISUAL: batch.visual_rows, TEXTUAL: batch.rows - batch.visual_rows}
        kept += sum(2 * b * kinds[part] * (width + rank * (part in learning)) for part in parts)
        if TEXTUAL not in parts:
            return kept + narrow * rank * (4 if b == 4 else b) * bool(learning)
        if _asks(job):
            kept += b * 2 * wings.router_positions
        sums = 4 * (2 * rank + 2) if b == 4 else b * 2 * rank
        return kept + narrow * (sums + 4 * 4 + 2 * b + 2 * b * llm.hidden_size)

    def layer_messages(
        self, job: Job, layout: Layout, batch: MicroBatch, layer: int, *, rows_learn: bool
    ) -> Iterator[Message]:
        """Rows to all ranks, sums of low-rank rows in float32; gradients of what each rank uses for its own heads."""
        wings, llm, size, b = _wings(job.model), job.model.llm, layout.tensor, job.bytes
        if size == 1 or not wings.has_learners(layer):
            return
        rows, again = layout.rows_and_narrow(batch.rows)[0], int(layout.recompute)
        parts = _learners(job.bypass)
        hidden = b * rows * llm.hidden_size
        sums = 4 * rows * (wings.rank * len(parts) + (2 if _asks(job) else 0))
        back = int(rows_learn or job.learns("lora"))
        if layout.sequence:
            yield message("tensor", "all_gather", hidden, 1, size)
            yield message("tensor", "all_gather", hidden, again, size, backward=True)
            yield message("tensor", "reduce_scatter", hidden, back, size, backward=True)
            yield message("tensor", "reduce_scatter", sums, 1, size)
            yield message("tensor", "reduce_scatter", sums, again, size, backward=True)
            yield message("tensor", "all_gather", sums, 1, size, backward=True)
        else:
            yield message("tensor", "all_reduce", hidden, back, size, backward=True)
            yield message("tensor", "all_reduce", sums, 1, size)
            yield message("tensor", "all_reduce", sums, again, size, backward=True)
        low = b * wings.rank * llm.hidden_size
        for part in parts:
            if job.learns(part):
                yield message("tensor", "all_reduce", low, 3 + layout.sequence, size, backward=True)
        if _asks(job) and job.learns(TEXTUAL):
            router = 2 * b * (wings.router_positions + layout.sequence)
            yield message("tensor", "all_reduce", router, 1, size, backward=True)


def _wings(model: ParrotConfig) -> WingsConfig:
    assert model.wings is not None, "the registry chose this system"
    return model.wings


def _asks(job: Job) -> bool:
    """Whether routers read the attention of their layers."""
    return TEXTUAL not in job.bypass and _wings(job.model).routing == "attention"


def _learners(bypass: Collection[str]) -> list[str]:
    """Parts of the learners that run."""
    return [part for part in (VISUAL, TEXTUAL) if part not in bypass]
