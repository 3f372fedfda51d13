"""SystemCosts: what the parts of a system cost besides tower and decoder: work, parameters, activations, messages."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Weight, Work

if TYPE_CHECKING:
    from parrot_sys.systems.job import Job, MicroBatch
    from parrot_sys.systems.layout import Layout

# T rows of a micro-batch (T' on this rank), n images of V rows, t tensor-parallel ranks, H hidden_size of the decoder


class SystemCosts:
    """Base of the costs of all systems: nothing besides tower and decoder.

    The first stage is the first pipeline stage, which holds everything before the decoder. Layers count from 0.
    """

    def image_costs(self, model: ParrotConfig, bypass: Collection[str]) -> list[Cost]:
        """Forward work of the parts between tower and decoder, in their order.

        Args:
            model: sizes.
            bypass: parts that are passed by.
        """
        return []

    def layer_costs(self, model: ParrotConfig, bypass: Collection[str], layer: int) -> list[Cost]:
        """Forward work of the parts inside a decoder layer, in their order."""
        return []

    def image_work(self, job: Job, layout: Layout, batch: MicroBatch) -> dict[str, Work]:
        """Work of a rank of the first stage on its `batch.images`: name for people -> floating-point operations."""
        found = {}
        for cost in self.image_costs(job.model, job.bypass):
            found[cost.part] = Work(1, job.backward(cost.part)) * (batch.images * cost.image)
        return found

    def layer_kind(self, model: ParrotConfig, layer: int) -> Hashable:
        """Layers of one kind cost the same."""
        return model.llm.has_experts(layer)

    def input_learns(self, job: Job) -> bool:
        """Whether the rows of images among those of the text carry a gradient into the decoder."""
        return False

    def layer_learns(self, job: Job, layer: int) -> bool:
        """Whether a part of the system inside a decoder layer gives gradients to the rows that leave it."""
        return False

    def learns_before_attention(self, job: Job, layer: int) -> bool:
        """Whether such a part is in front of the layer's attention."""
        return False

    def asks_attention(self, job: Job, layer: int) -> bool:
        """Whether the layer's own attention also has to tell its weights (`ColumnSum`)."""
        return False

    def tensor_sizes(self, model: ParrotConfig) -> Mapping[str, int]:
        """Dotted setting of `model` -> size that tensor-parallel ranks cut."""
        return {}

    def expert_sizes(self, model: ParrotConfig) -> Mapping[str, tuple[int, int]]:
        """Dotted section of `model` -> number and inner width of experts that ranks share."""
        experts = model.llm.experts
        return {} if experts is None else {"llm.experts": (experts.num_experts, experts.ffn_hidden_size)}

    def weights(self, model: ParrotConfig, layout: Layout) -> Iterator[Weight]:
        """Parameters of a rank of the first stage, without tower and embedding."""
        return iter(())

    def layer_weights(self, model: ParrotConfig, layout: Layout, layer: int) -> Iterator[Weight]:
        """Parameters that a rank has in a decoder layer besides the layer's own."""
        return iter(())

    def memory(self, job: Job, batch: MicroBatch) -> tuple[float, int]:
        """Rows and width of what the layers read besides their own rows; (0, 0) for nothing."""
        return 0.0, 0

    def memory_learns(self, job: Job) -> bool:
        """Whether a gradient comes back from the layers to the memory."""
        return job.learns("llm") or self.input_learns(job)

    def first_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Bytes that the parts before the decoder keep for the backward pass, without tower and embedding."""
        return 0.0

    def chunk_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layers: Collection[int]) -> float:
        """Bytes that some layers, which one stage runs one after the other, keep together."""
        return 0.0

    def layer_bytes(self, job: Job, layout: Layout, batch: MicroBatch, layer: int) -> float:
        """Bytes that a decoder layer keeps besides those of attention and MLP."""
        return 0.0

    def working_bytes(self, job: Job, layout: Layout, batch: MicroBatch) -> float:
        """Gradients of the widest activations before the decoder, which exist for a moment."""
        return 0.0

    def first_messages(self, job: Job, layout: Layout, batch: MicroBatch) -> Iterator[Message]:
        """Messages of the parts before the decoder, without those of tower and embedding."""
        return iter(())

    def layer_messages(
        self, job: Job, layout: Layout, batch: MicroBatch, layer: int, *, rows_learn: bool
    ) -> Iterator[Message]:
        """Messages of a decoder layer besides those of attention and MLP.

        Args:
            job: the model as it is trained.
            layout: of the ranks.
            batch: micro-batch.
            layer: number.
            rows_learn: whether the rows that come in carry a gradient.
        """
        return iter(())
