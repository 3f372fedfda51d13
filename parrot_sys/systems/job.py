"""Subject of the cost formulas: a model with its frozen parts and precision, and one micro-batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.flops import costs, forward_passes
from parrot_sys.systems.registry import system_of
from parrot_sys.systems.system_costs import SystemCosts

Kernels = Literal["gpu", "cpu"]


@dataclass(kw_only=True, frozen=True)
class Job:
    """A model as it is trained."""

    model: ParrotConfig
    trainable: Mapping[str, bool]
    """Part -> whether it learns, of all parts of the system."""
    precision: Literal["fp32", "bf16"] = "bf16"
    bypass: Collection[str] = ()
    """Parts that are passed by."""
    kernels: Kernels = "gpu"
    """`cpu`: RMSNorm is a chain of operations in float32 there, which keeps more than the fused kernel."""

    @property
    def bytes(self) -> int:
        """Of a parameter or activation."""
        return 2 if self.precision == "bf16" else 4

    @cached_property
    def costs(self) -> SystemCosts:
        """What the parts of the system cost."""
        return system_of(self.model).costs()

    @cached_property
    def passes(self) -> Mapping[str, int]:
        """Part -> forward passes that its forward and backward pass together cost."""
        return forward_passes(costs(self.model, self.bypass), self.trainable)

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
