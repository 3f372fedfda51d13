"""Cost: the work that one part of a model does in a forward pass."""

from __future__ import annotations

from dataclasses import dataclass


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
