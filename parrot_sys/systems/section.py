"""Section: the settings of one system, and what follows from them for the rest of the model's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, TypeVar

from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.towers import Tiling, VisionConfig

Compat = Literal["released", "paper"]
"""Rules that a model follows where the public code differs from the paper."""

S = TypeVar("S", bound="Section")


class ModelSettings(Protocol):
    """The settings beside a section."""

    @property
    def llm(self) -> LLMConfig:
        """Decoder."""

    @property
    def vision(self) -> VisionConfig:
        """Vision tower."""

    @property
    def projector(self) -> ProjectorConfig:
        """Projector."""

    @property
    def moe(self) -> TextGuidedMoEConfig:
        """Text-guided experts."""

    @property
    def max_seq_len(self) -> int:
        """Longest sample in rows."""


class Section:
    """Base of the sections of `model` that choose a system by being set; a frozen dataclass with settings."""

    __slots__ = ()
    key: ClassVar[str]
    """Name of the section in configurations."""

    def check(self, model: ModelSettings) -> None:
        """Checks the settings against the others.

        Raises:
            ConfigError: they contradict each other.
        """

    def rows_per_image(self, vision: VisionConfig) -> int:
        """Rows that an image takes among those of the text."""
        return vision.num_visual_rows

    def tiling(self, vision: VisionConfig) -> Tiling | None:
        """Tiles that pictures are cut into; None where a picture is one image."""
        return None

    @property
    def limits(self) -> Mapping[str, int]:
        """Dotted setting -> the most rows of a sample that it allows."""
        return {}

    @property
    def most_images(self) -> int | None:
        """Most images of a sample; None for any number."""
        return None

    @property
    def image_token_id(self) -> int | None:
        """Token of the vocabulary that stands for an image; None where an image has no token of its own."""
        return None

    @property
    def rule(self) -> str | None:
        """Name of the rule that the model follows where the public code differs from the paper, if it does."""
        return None

    def with_compat(self: S, compat: Compat) -> S:
        """The same settings with the rules of the public code (`released`) or of the paper."""
        return self
