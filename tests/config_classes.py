"""Configuration classes for the tests of command line and YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class SourceConfig:
    """One data set."""

    path: Path
    weight: float = 1.0


@dataclass(kw_only=True, frozen=True, slots=True)
class MoEConfig:
    """The experts."""

    num_experts: int = 6
    """How many experts there are."""
    topk: int = 2
    routing: Literal["dense", "topk"] = "dense"

    def __post_init__(self) -> None:
        if self.topk > self.num_experts:
            raise ConfigError(f"moe.topk must be in [1, moe.num_experts={self.num_experts}], got {self.topk}")


@dataclass(kw_only=True, frozen=True, slots=True)
class AdapterConfig:
    """A part that is there only when it is asked for."""

    rank: int = 8
    """Its rank."""
    targets: tuple[str, ...] = ("q", "k")


@dataclass(kw_only=True, frozen=True, slots=True)
class ModelConfig:
    """The model."""

    moe: MoEConfig = field(default_factory=lambda: MoEConfig(topk=3))
    dropout: float | None = None
    adapter: AdapterConfig | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class RunConfig:
    """Trains something."""

    output: Path
    """Where to write."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lr: float = 1e-3
    name: str | None = None
    languages: tuple[str, ...] = ("en",)
    mix: dict[str, float] = field(default_factory=dict)
    sources: tuple[SourceConfig, ...] = ()
    resume: bool = False
    size: tuple[int, int] = (1, 2)
