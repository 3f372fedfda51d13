"""Projector from the vision tower's width to the LLM's: `mlpNx_gelu` (LLaVA / Parrot naming)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class ProjectorConfig:
    """Shape of the projector."""

    type: str = "mlp2x_gelu"
    """`linear` or `mlpNx_gelu` with N linear layers (N >= 1)."""

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.type)
        return int(match[1]) if match else 1

    def __post_init__(self) -> None:
        if self.type != "linear" and not re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.type):
            raise ConfigError(f"projector.type must be 'linear' or 'mlpNx_gelu' with N >= 1, got {self.type!r}")


class Projector(nn.Sequential):
    """Linear(input_size, hidden_size) then (GELU(erf), Linear(hidden_size, hidden_size)) * (N - 1), all with biases.

    Children are numbered as in the released checkpoints (`mm_projector.0`, `.2`, ...).
    """

    def __init__(
        self,
        config: ProjectorConfig,
        input_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers: list[nn.Module] = [nn.Linear(input_size, hidden_size, device=device, dtype=dtype)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)]
        super().__init__(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[..., input_size] -> [..., hidden_size]."""
        return super().forward(features)
