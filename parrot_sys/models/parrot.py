"""ParrotConfig: the whole model in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field

from parrot_sys.errors import ConfigError
from parrot_sys.models.llm import LLMConfig
from parrot_sys.models.vision import VisionConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig


@dataclass(kw_only=True, frozen=True, slots=True)
class ParrotConfig:
    """Vision tower -> projector -> text-guided MoE -> decoder (Parrot, arXiv 2406.02539, section 3)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """From the tower's width to the decoder's."""
    moe: TextGuidedMoEConfig = field(default_factory=TextGuidedMoEConfig)
    """Text-guided experts."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """Decoder."""
    lora: LoRAConfig | None = None
    """Low-rank updates of the decoder's linear layers."""
    tokenizer_path: str | None = None
    """Directory of the Hugging Face tokenizer; beside the checkpoint when not set."""
    max_seq_len: int = 2048
    """Longest sample in rows after image expansion (Hugging Face: tokenizer_model_max_length)."""

    def __post_init__(self) -> None:
        if self.max_seq_len < 1:
            raise ConfigError(f"model.max_seq_len must be >= 1, got {self.max_seq_len}")
