"""Costs of the parts of a model: work, parameters and messages, of the whole and of one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Multiply-adds of a part's forward pass, times two."""

    part: str
    """Name of the part, whose gradients decide how often the work is done in training."""
    image: float = 0.0
    """For each image (tile)."""
    row: float = 0.0
    """For each row that the decoder gets, of text and images."""
    pair: float = 0.0
    """For the square of the rows of each sample (causal attention counts half of all pairs)."""
    label: float = 0.0
    """For each row with a label."""
    only_beside_images: bool = False
    """Whether micro-batches of text alone pass the part by."""

    def __add__(self, other: Cost) -> Cost:
        """Of the same part, both together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("image", "row", "pair", "label")}
        return replace(self, **sums)


@dataclass(frozen=True, slots=True)
class Work:
    """Forward and backward pass of one part of the model: floating-point operations, or seconds."""

    forward: float
    backward: float

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.forward, factor * self.backward)

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter, `count` times."""

    component: str  # name of its part
    numel: int  # on this rank
    count: int = 1
    routed: bool = False  # an expert's, whose copies are on other ranks than those of dense parameters
    replicated: bool = False  # whole on every tensor-parallel rank, used on a part of the rows under SP
    by_heads: bool = False  # whole on every tensor-parallel rank, used on its own heads

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.numel * self.count


Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """`calls` collectives of one kind with `payload` bytes in all."""

    dimension: str  # of Layout.stride
    operation: Operation
    payload: float
    calls: float
    size: int  # ranks of the group
    backward: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        if self.operation == "send":
            return self.payload
        share = (self.size - 1) / self.size
        return self.payload * share * (2 if self.operation == "all_reduce" else 1)


def message(
    dimension: str, operation: Operation, payload: float, calls: float, size: int, *, backward: bool = False
) -> Message:
    """`calls` messages of `payload` bytes each."""
    return Message(
        dimension=dimension, operation=operation, payload=payload * calls, calls=calls, size=size, backward=backward
    )
