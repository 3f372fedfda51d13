"""Configuration of MultiModal-GPT (arXiv 2305.04790): resampler and gated cross-attention of OpenFlamingo 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from parrot_sys.errors import ConfigError
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig, MediaRule
from parrot_sys.modules.perceiver import ResamplerConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class FlamingoConfig:
    """Cross-attention of text to images that have no rows in the text; the defaults are those of OpenFlamingo-9B."""

    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    """From the patches of an image to its latents."""
    cross_attention: GatedCrossAttentionConfig = field(default_factory=GatedCrossAttentionConfig)
    """Blocks through which text reads the latents."""
    every_n_layers: int = 4
    """A block is before every n-th decoder layer: layers n, 2 n, ... counted from 1."""
    media_rule: MediaRule = "previous"
    """Which image a row reads: `previous` the last one at or before it; `next` the first one at or after it, so that
    rows after the last image read none (the released MultiModal-GPT, in training as in use)."""
    image_token_id: int = 32001
    """Token that stands for an image in the text and has an embedding of its own."""

    def __post_init__(self) -> None:
        if self.every_n_layers < 1:
            raise ConfigError(f"flamingo.every_n_layers must be >= 1, got {self.every_n_layers}")
        if self.media_rule not in get_args(MediaRule):
            raise ConfigError(
                f"flamingo.media_rule must be one of {', '.join(get_args(MediaRule))}, got {self.media_rule!r}"
            )
        if self.image_token_id < 0:
            raise ConfigError(f"flamingo.image_token_id must be >= 0, got {self.image_token_id}")

    def has_block(self, layer_number: int) -> bool:
        """Whether a block is before this decoder layer, counted from 1."""
        return layer_number % self.every_n_layers == 0
