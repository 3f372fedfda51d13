"""Subject of the formulas: a model with its frozen parts and precision, and one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from parrot_sys.planning.config import PlanConfig
from parrot_sys.systems.config import ParrotConfig

Kernels = Literal["gpu", "cpu"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Job:
    """A model as it is trained."""

    model: ParrotConfig
    trainable: Mapping[str, bool]
    """Part -> whether it learns, of all parts of the system."""
    precision: Literal["fp32", "bf16"] = "bf16"
    moe_active: bool = True
    kernels: Kernels = "gpu"
    """`cpu`: RMSNorm is a chain of operations in float32 there, which keeps more than the fused kernel."""

    @staticmethod
    def of(config: PlanConfig) -> Job:
        """The job that a plan is about."""
        return Job(
            model=config.model,
            trainable=config.learning(),
            precision=config.precision,
            moe_active=config.moe_active,
        )

    @property
    def bytes(self) -> int:
        """Of a parameter or activation."""
        return 2 if self.precision == "bf16" else 4

    def gradient_reaches(self, component: str) -> bool:
        """Whether the backward pass goes through a component: it, or one whose output it reads, learns."""
        learns = self.trainable
        chain = ("vision", "projector", "moe", "llm")
        before = chain[: chain.index(component) + 1]
        # The experts read the word embeddings, which belong to the decoder.
        return any(learns[name] for name in before) or (component in ("moe",) and learns["llm"])

    @property
    def chosen_experts(self) -> int:
        """Experts that work on an image."""
        moe = self.model.moe
        return moe.topk if moe.routing == "topk" else moe.num_experts


@dataclass(kw_only=True, frozen=True, slots=True)
class MicroBatch:
    """Sizes of a packed micro-batch (docs/architecture.md)."""

    rows: float  # T
    images: float  # n
    guidance_rows: float  # G
    label_rows: float  # L
    squared_lengths: float  # sum over samples of the square of their rows
    samples: float = 1

    @staticmethod
    def of(config: PlanConfig, samples: float) -> MicroBatch:
        """`samples` typical ones."""
        sample, rows = config.sample, config.rows
        return MicroBatch(
            rows=samples * rows,
            images=samples * sample.images,
            guidance_rows=samples * (sample.text_tokens - sample.label_tokens) if sample.images else 0,
            label_rows=samples * sample.label_tokens,
            squared_lengths=samples * rows**2,
            samples=samples,
        )
