"""ParrotConfig: the whole model in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from parrot_sys.errors import ConfigError
from parrot_sys.models.flamingo import FlamingoConfig
from parrot_sys.models.llm import LLMConfig
from parrot_sys.modules.gated_cross_attention import MediaRule
from parrot_sys.modules.lora import LoRAConfig
from parrot_sys.modules.projector import ProjectorConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoEConfig
from parrot_sys.modules.wings import WingsConfig
from parrot_sys.paths import INPUT_FOLDER
from parrot_sys.towers import VisionConfig

Compat = Literal["released", "paper"]
"""Rules that a model follows where the public code differs from the paper."""


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
    wings: WingsConfig | None = None
    """Wings: modality learners and routers inside the decoder's layers."""
    lora: LoRAConfig | None = None
    """Low-rank updates of the decoder's linear layers."""
    flamingo: FlamingoConfig | None = None
    """MultiModal-GPT: text reads images by gated cross-attention, in place of projector and experts."""
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
        if self.wings is not None:
            self._check_wings(self.wings)
        if self.flamingo is not None:
            self._check_flamingo(self.flamingo)

    @property
    def rows_per_image(self) -> int:
        """Rows that an image takes among those of the text: those of the tower, or the image token alone."""
        return self.vision.num_visual_rows if self.flamingo is None else 1

    @property
    def max_positions(self) -> int:
        """Positions of the decoder, and of the router of Wings."""
        positions = self.llm.max_position_embeddings
        return positions if self.wings is None else min(positions, self.wings.router_positions)

    @property
    def max_rows(self) -> int:
        """Longest request in rows, with its images and its answer: `max_seq_len`, or the model's positions if fewer."""
        return min(self.max_seq_len, self.max_positions)

    def with_compat(self, compat: Compat | None) -> ParrotConfig:
        """The same model with the rules of the public code (`released`) or of the paper; as it is for None.

        Changes what both do differently with the same weights: which image a row reads (MultiModal-GPT), what the
        learners see and how their blend is added (Wings).

        Raises:
            ConfigError: there are no such rules.
        """
        if compat not in (None, *get_args(Compat)):
            raise ConfigError(f"compat must be None or one of {', '.join(get_args(Compat))}, got {compat!r}")
        if compat is not None and self.wings is not None:
            return replace(self, wings=replace(self.wings, rule=compat))
        if compat is None or self.flamingo is None:
            return self
        rule: MediaRule = "next" if compat == "released" else "previous"
        return replace(self, flamingo=replace(self.flamingo, media_rule=rule))

    def _check_lora(self, lora: LoRAConfig) -> None:
        if beside_experts := [name for name in lora.targets if name in ("gate_proj", "up_proj", "down_proj")]:
            raise ConfigError(
                "model.lora.targets must leave out gate_proj, up_proj and down_proj with model.llm.experts "
                f"(experts have no low-rank updates here), got {', '.join(beside_experts)}"
            )

    def _check_wings(self, wings: WingsConfig) -> None:
        llm = self.llm
        if self.flamingo is not None:
            raise ConfigError("model.wings and model.flamingo are two systems, got both: unset one")
        if llm.kv_channels * llm.num_attention_heads != llm.hidden_size:
            raise ConfigError(
                "model.wings needs heads that fill the hidden size: model.llm.head_dim must be "
                f"{llm.hidden_size / llm.num_attention_heads:g}, got {llm.kv_channels}"
            )
        if wings.layers is not None and not 0 <= wings.layers[0] <= wings.layers[-1] < llm.num_layers:
            raise ConfigError(
                f"model.wings.layers must be in 0 .. {llm.num_layers - 1} (model.llm.num_layers={llm.num_layers}), "
                f"got {list(wings.layers)}"
            )
        if self.max_seq_len > wings.router_positions:
            raise ConfigError(
                f"model.max_seq_len must be <= model.wings.router_positions={wings.router_positions}, "
                f"got {self.max_seq_len}"
            )

    def _check_flamingo(self, flamingo: FlamingoConfig) -> None:
        if self.moe.num_experts:
            raise ConfigError(
                f"model.moe.num_experts must be 0 with model.flamingo, got {self.moe.num_experts}: cross-attention "
                "reads the image, no experts do"
            )
        if flamingo.image_token_id >= self.llm.vocab_size:
            raise ConfigError(
                f"model.flamingo.image_token_id must be < model.llm.vocab_size={self.llm.vocab_size}, "
                f"got {flamingo.image_token_id}"
            )
        if flamingo.every_n_layers > self.llm.num_layers:
            raise ConfigError(
                f"model.flamingo.every_n_layers must be <= model.llm.num_layers={self.llm.num_layers}, "
                f"got {flamingo.every_n_layers}: no layer would read an image"
            )
