"""Rotary position embeddings (RoPE, arXiv 2104.09864), with the scaling of Llama 3.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's rule for longer sequences (Hugging Face: rope_type llama3); the defaults are its own numbers.

    Wave lengths above `original_positions / low_frequency` are stretched by `factor`, those below
    `original_positions / high_frequency` stay, those between are blended.
    """

    factor: float = 8.0
    """How much the longest wave lengths grow."""
    low_frequency: float = 1.0
    """Waves with at most so many turns in the original positions are stretched in full."""
    high_frequency: float = 4.0
    """Waves with at least so many turns stay as they are."""
    original_positions: int = 8192
    """Positions that the decoder was trained with first."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency", "high_frequency", "original_positions"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"rope_scaling.{name} must be a finite number > 0, got {getattr(self, name)}")
        if self.low_frequency >= self.high_frequency:
            raise ConfigError(
                f"rope_scaling.low_frequency must be < rope_scaling.high_frequency={self.high_frequency}, "
                f"got {self.low_frequency}"
            )


def rotary_cos_sin(
    position_ids: Tensor, width: int, base: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each row's rotation, computed in float32.

    Args:
        position_ids: int64 [T].
        width: d, width of a head.
        base: wave lengths are 2 pi base^(2 i / d).
        dtype: of the result.
        scaling: changes the wave lengths.

    Returns:
        Two tensors [T, 1, d / 2].
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    frequencies = 1.0 / base**exponents
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = position_ids.to(torch.float32)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of each head: rows [T, heads, d]; cos, sin [T, 1, d / 2]."""
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def turning(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Factors for `turn`, from cosine and sine [T, 1, d / 2].

    Returns:
        [T, 1, 1, 1, d / 2], and [T, 1, 1, 2, d / 2] with the signs of both halves.
    """
    return cos[:, :, None, None], torch.stack((-sin, sin), dim=-2).unsqueeze(1)


def turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in a third of the calls, for inference: rows [T, g, r, d]; cos, sin from `turning`, once a step."""
    halves = rows.unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2)
