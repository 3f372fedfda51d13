"""Configuration of MultiModal-GPT (arXiv 2305.04790): resampler and gated cross-attention of OpenFlamingo 1."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.modules.gated_cross_attention import GatedCrossAttentionConfig, MediaRule
from parrot_sys.modules.perceiver import ResamplerConfig
from parrot_sys.systems.section import Compat, ModelSettings, Section
from parrot_sys.towers import VisionConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class FlamingoConfig(Section):
    """Cross-attention of text to images that have no rows in the text; the defaults are those of OpenFlamingo-9B."""

    key: ClassVar[str] = "flamingo"
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

    def check(self, model: ModelSettings) -> None:
        """Checks the image token and the blocks against the decoder.

        Raises:
            ConfigError: the token is not in the vocabulary, or no layer has a block.
        """
        if self.image_token_id >= model.llm.vocab_size:
            raise ConfigError(
                f"model.flamingo.image_token_id must be < model.llm.vocab_size={model.llm.vocab_size}, "
                f"got {self.image_token_id}"
            )
        if self.every_n_layers > model.llm.num_layers:
            raise ConfigError(
                f"model.flamingo.every_n_layers must be <= model.llm.num_layers={model.llm.num_layers}, "
                f"got {self.every_n_layers}: no layer would read an image"
            )

    def rows_per_image(self, vision: VisionConfig) -> int:
        """1: the image token alone is among the rows of the text."""
        return 1

    @property
    def rule(self) -> str:
        """Rule by which a row chooses its image."""
        return self.media_rule

    def with_compat(self, compat: Compat) -> FlamingoConfig:
        """The same settings with the image that a row reads in the public code (`next`) or the paper (`previous`)."""
        rule: MediaRule = "next" if compat == "released" else "previous"
        return replace(self, media_rule=rule)
