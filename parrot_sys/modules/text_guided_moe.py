"""TextGuidedMoE: the prompt's language chooses the experts that turn an image's visual rows into language-specific ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class TextGuidedMoEConfig:
    num_experts: int = 6
    """E; 0 builds no MoE at all (plain projector)."""
    ffn_hidden_size: int = 4096
    """I, inner width of each SwiGLU expert."""
    routing: Literal["dense", "topk"] = "dense"
    """`dense` runs every expert (rule of the released checkpoints), `topk` the `topk` best (paper, eq. 4)."""
    topk: int = 2
    """Experts per image under `routing=topk`."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum (topk only)."""
    residual: Literal["code", "paper", "none"] = "code"
    """`code`: MoE(X) + residual_weight * X (released code); `paper`: X + residual_weight * MoE(X) (eq. 5)."""
    residual_weight: float = 0.1
    """w of the released code (its default) or alpha of the paper."""
    guidance: Literal["prompt", "first_turn"] = "prompt"
    """Guiding tokens: every token without a label, as released, or only those up to the first answer (no later turns)."""
    aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss over the global batch."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss."""
    recompute: bool = False
    """Store only X for the backward pass of the experts and compute the rest again."""

    def __post_init__(self) -> None:
        if self.num_experts < 0:
            raise ConfigError(f"moe.num_experts must be >= 0, got {self.num_experts}")
        if self.num_experts and self.routing == "topk" and not 1 <= self.topk <= self.num_experts:
            raise ConfigError(f"moe.topk must be in [1, moe.num_experts={self.num_experts}], got {self.topk}")
        if self.ffn_hidden_size < 1:
            raise ConfigError(f"moe.ffn_hidden_size must be >= 1, got {self.ffn_hidden_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingOutput:
    """What the router decided for n images and E experts."""

    logits: Tensor  # [n, E] float32
    probs: Tensor  # [n, E]; zeros for experts that were not chosen
    topk_indices: Tensor | None = None  # [n, K] int64 under routing=topk
    aux_loss: Tensor | None = None  # 0-d, already times its coefficient
    z_loss: Tensor | None = None  # 0-d, already times its coefficient
