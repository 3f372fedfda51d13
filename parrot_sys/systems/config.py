"""ParrotConfig: the whole model in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.paths import INPUT_FOLDER
from parrot_sys.systems.llava.config import LlavaConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.section import Compat, Section
from parrot_sys.systems.wings.config import WingsConfig
from parrot_sys.towers import Tiling, VisionConfig

SECTIONS = ("wings", "flamingo", "llava")
"""Fields of ParrotConfig that choose another system than Parrot by being set."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ParrotConfig:
    """A decoder with pictures: Parrot (arXiv 2406.02539, section 3), or the system whose section is set."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """From the tower's width to the decoder's."""
    moe: TextGuidedMoEConfig = field(default_factory=TextGuidedMoEConfig)
    """Text-guided experts."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """Decoder."""
    wings: WingsConfig | None = None
    """Wings: modality learners and routers inside the decoder's layers."""
    lora: LoRAConfig | None = None
    """Low-rank updates of the decoder's linear layers."""
    flamingo: FlamingoConfig | None = None
    """MultiModal-GPT: text reads images by gated cross-attention, in place of projector and experts."""
    llava: LlavaConfig | None = None
    """LLaVA: pictures cut into tiles, and the projector alone."""
    template: Literal["chatml", "llama3", "instruction", "vicuna"] = "chatml"
    """Format of conversations: `chatml` (Parrot, Wings), `llama3` (Llama 3), `instruction` (MultiModal-GPT), `vicuna`
    (Vicuna)."""
    tokenizer_path: Annotated[str | None, INPUT_FOLDER] = None
    """Directory of the Hugging Face tokenizer; beside the checkpoint when not set."""
    max_seq_len: int = 2048
    """Longest sample in rows after image expansion, also of a request with its answer (Hugging Face:
    tokenizer_model_max_length)."""

    def __post_init__(self) -> None:
        if self.max_seq_len < 1:
            raise ConfigError(f"model.max_seq_len must be >= 1, got {self.max_seq_len}")
        if self.moe.num_experts and self.vision.select_feature != "cls_patch":
            raise ConfigError(
                "model.moe needs model.vision.select_feature cls_patch, whose first row it routes by, got "
                f"{self.vision.select_feature}: set that, or model.moe.num_experts 0"
            )
        if self.lora is not None and self.llm.experts is not None:
            self._check_lora(self.lora)
        chosen = [name for name in SECTIONS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(f'model.{name}' for name in chosen)} are two systems: unset one")
        if self.section is not None:
            if self.moe.num_experts:
                raise ConfigError(
                    f"model.moe.num_experts must be 0 with model.{self.section.key}, got {self.moe.num_experts}: "
                    "text-guided experts are another system's"
                )
            self.section.check(self)

    @property
    def section(self) -> Section | None:
        """Settings of the chosen system; None for Parrot, whose settings are `moe`."""
        return next((getattr(self, name) for name in SECTIONS if getattr(self, name) is not None), None)

    @property
    def rows_per_image(self) -> int:
        """Rows that an image takes among those of the text."""
        return self.vision.num_visual_rows if self.section is None else self.section.rows_per_image(self.vision)

    @property
    def tiling(self) -> Tiling | None:
        """Tiles that pictures are cut into; None where a picture is one image."""
        return None if self.section is None else self.section.tiling(self.vision)

    @property
    def limits(self) -> dict[str, int]:
        """Dotted setting -> the most rows of a request, with its images and its answer, that it allows."""
        limits = {
            "model.max_seq_len": self.max_seq_len,
            "model.llm.max_position_embeddings": self.llm.max_position_embeddings,
        }
        return limits if self.section is None else {**limits, **self.section.limits}

    @property
    def max_rows(self) -> int:
        """Longest request in rows, with its images and its answer."""
        return min(self.limits.values())

    @property
    def most_images(self) -> int | None:
        """Most images of a sample; None for any number."""
        return None if self.section is None else self.section.most_images

    @property
    def image_token_id(self) -> int | None:
        """Token of the vocabulary that stands for an image; None where an image has no token of its own."""
        return None if self.section is None else self.section.image_token_id

    def with_compat(self, compat: Compat | None) -> ParrotConfig:
        """The same model with the rules of the public code (`released`) or of the paper; as it is for None.

        Changes what both do differently with the same weights: which image a row reads, what learners see.

        Raises:
            ConfigError: there are no such rules.
        """
        if compat not in (None, *get_args(Compat)):
            raise ConfigError(f"compat must be None or one of {', '.join(get_args(Compat))}, got {compat!r}")
        if compat is None or self.section is None:
            return self
        changed: Any = {self.section.key: self.section.with_compat(compat)}
        return replace(self, **changed)

    def _check_lora(self, lora: LoRAConfig) -> None:
        if beside_experts := [name for name in lora.targets if name in ("gate_proj", "up_proj", "down_proj")]:
            raise ConfigError(
                "model.lora.targets must leave out gate_proj, up_proj and down_proj with model.llm.experts "
                f"(experts have no low-rank updates here), got {', '.join(beside_experts)}"
            )
