"""SystemCosts: costs of the parts of a system besides tower and decoder (work, parameters, activations, messages), and
the job that they are asked about."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.cost import Cost, Message, Weight, Work
from parrot_sys.systems.layout import Layout

Kernels = Literal["gpu", "cpu"]
# T rows of a micro-batch (T' on this rank), n images of V rows, t tensor-parallel ranks, H hidden_size of the decoder


@dataclass(kw_only=True, frozen=True)
class Job:
    """A model as it is trained."""

    model: ParrotConfig
    trainable: Mapping[str, bool]
    """Part -> whether it learns, of all parts of the system."""
    precision: Literal["fp32", "bf16"] = "bf16"
    costs: SystemCosts
    """Of the parts of the system."""
    passes: Mapping[str, int]
    """Part -> forward passes that its forward and backward pass together cost."""
    bypass: Collection[str] = ()
    """Parts that are passed by."""
    kernels: Kernels = "gpu"
    """`cpu`: RMSNorm is a chain of operations in float32 there, which keeps more than the fused kernel."""

    @property
    def bytes(self) -> int:
        """Of a parameter or activation."""
        return 2 if self.precision == "bf16" else 4

    def backward(self, part: str) -> int:
        """Forward passes that a part's backward pass costs."""
        return self.passes[part] - 1

    def learns(self, *parts: str) -> bool:
        """Whether any of the parts learns; those that the system does not have do not."""
        return any(self.trainable.get(part, False) for part in parts)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each decoder layer the first one that costs the same."""
        seen: dict[object, int] = {}
        kinds = []
        for layer in range(self.model.llm.num_layers):
            kind = (self.costs.layer_kind(self.model, layer), self.rows_learn[layer])
            kinds.append(seen.setdefault(kind, layer))
        return tuple(kinds)

    @cached_property
    def rows_learn(self) -> tuple[bool, ...]:
        """For each decoder layer whether the rows that come into it carry a gradient, on the first pipeline stage."""
        return self._rows_learn_after[:-1]

    @cached_property
    def _rows_learn_after(self) -> tuple[bool, ...]:
        """Whether the rows carry a gradient, before the first layer and after each one."""
        learn = [self.learns("llm") or self.costs.input_learns(self)]
        for layer in range(self.model.llm.num_layers):
            learn.append(learn[-1] or self.learns("lora") or self.costs.layer_learns(self, layer))
        return tuple(learn)

    @property
    def anything_learns(self) -> bool:
        """Whether a gradient comes out of the decoder's last layer."""
        return self._rows_learn_after[-1]


@dataclass(kw_only=True, frozen=True, slots=True)
class MicroBatch:
    """Sizes of a packed micro-batch (docs/architecture.md)."""

    rows: float  # T
    images: float  # n; of a picture that is cut each tile
    visual_rows: float  # R, among the T
    guidance_rows: float  # G
    label_rows: float  # L
    squared_lengths: float  # sum over samples of the square of their rows
    samples: float = 1


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
