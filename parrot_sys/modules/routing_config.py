"""TextGuidedMoEConfig: settings of the text-guided experts and of what their router learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from parrot_sys.errors import ConfigError

_DEFAULT_TOPK = 2
_COEFFICIENTS = ("aux_loss_coeff", "z_loss_coeff", "information_coeff", "evenness_coeff", "entropy_coeff")


@dataclass(kw_only=True, frozen=True, slots=True)
class TextGuidedMoEConfig:
    """Experts, routing and residual of TextGuidedMoE."""

    num_experts: int = 6
    """E; 0 builds no MoE at all (plain projector)."""
    ffn_hidden_size: int = 4096
    """I, inner width of each SwiGLU expert."""
    routing: Literal["dense", "topk"] = "dense"
    """`dense` runs every expert (rule of the released checkpoints), `topk` the `topk` best (paper, eq. 4)."""
    topk: int = _DEFAULT_TOPK
    """Experts per image under `routing=topk`."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum (topk only)."""
    residual: Literal["code", "paper", "none"] = "code"
    """`code`: MoE(X) + residual_weight * X (released code); `paper`: X + residual_weight * MoE(X) (eq. 5)."""
    residual_weight: float = 0.1
    """w of the released code (its default) or alpha of the paper."""
    guidance: Literal["prompt", "first_turn"] = "prompt"
    """Guiding tokens: all without a label, as released, or only those up to the first answer (no later turns)."""
    aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss over the global batch."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss."""
    information_coeff: float = 0.0
    """Weight of minus the information I(expert; language) of the global batch in nats: routes that carry the language
    of the record. An image whose record states no language has one of its own."""
    evenness_coeff: float = 0.0
    """Weight of a pull towards equal use: the gradient of an image's logits is the experts' mean scores over the global
    batch less equal shares. Unlike that of an entropy it does not vanish for an expert that gets no images."""
    entropy_coeff: float = 0.0
    """Weight of the mean entropy of an image's own scores in nats, which sharper routes lower."""
    normalize_guidance: bool = False
    """Divide each guiding row by its root mean square, and the scores of the rows by H in place of sqrt(H): small
    embeddings then leave no uniform route. Off as released."""
    router_scale: float = 1.0
    """Factor of the router's logits, and so of its learning rate; 1 as released."""
    router_scale_start: float | None = None
    """Factor at the first step of a run, from which it goes to `router_scale` in `router_scale_steps` steps, by the
    same factor each: routes that begin soft and sharpen. Unset keeps `router_scale` throughout."""
    router_scale_steps: int = 0
    """Steps of a run until the factor is `router_scale`."""
    expert_bias: bool = False
    """Balance without a loss (arXiv 2408.15664, DeepSeek-V3): a bias of each expert is added to its score for the
    choice of the `topk` best, not to its weight. `routing=topk` only."""
    bias_update_rate: float = 1e-3
    """Change of the bias after each step: up for experts that fewer images of the global batch chose than their part,
    down for the others. 0 keeps it as it is."""
    recompute: bool = False
    """Store only X for the backward pass of the experts and compute the rest again."""
    fp8: bool = False
    """Multiply in float8 in the experts' forward pass (e4m3, scales by blocks of 128), on sm_90 and later: faster, and
    numbers are rounded by up to 1/16. The backward pass stays in the parameters' dtype."""

    def __post_init__(self) -> None:
        if self.num_experts < 0:
            raise ConfigError(f"moe.num_experts must be >= 0, got {self.num_experts}")
        # `dense` does not read topk: its default may stay when there is one expert.
        most = self.num_experts if self.routing == "topk" else max(self.num_experts, _DEFAULT_TOPK)
        if self.topk < 1 or (self.num_experts and self.topk > most):
            raise ConfigError(f"moe.topk must be in [1, moe.num_experts={self.num_experts}], got {self.topk}")
        for name in (*_COEFFICIENTS, "bias_update_rate"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"moe.{name} must be a finite number >= 0, got {getattr(self, name)}")
        self._check_scales()
        if self.expert_bias and self.routing != "topk":
            raise ConfigError(
                f'moe.expert_bias needs moe.routing="topk", got {self.routing!r}: without a choice there is nothing to '
                "balance"
            )
        if not math.isfinite(self.residual_weight):
            raise ConfigError(f"moe.residual_weight must be a finite number, got {self.residual_weight}")
        if self.ffn_hidden_size < 1:
            raise ConfigError(f"moe.ffn_hidden_size must be >= 1, got {self.ffn_hidden_size}")

    def _check_scales(self) -> None:
        for name in ("router_scale", "router_scale_start"):
            scale = getattr(self, name)
            if scale is not None and not (scale > 0 and math.isfinite(scale)):
                raise ConfigError(f"moe.{name} must be a finite number > 0, got {scale}")
        if self.router_scale_steps < 0 or (self.router_scale_start is None) != (self.router_scale_steps == 0):
            raise ConfigError(
                "moe.router_scale_start and moe.router_scale_steps belong together: set both (the second > 0) or "
                f"neither, got {self.router_scale_start} and {self.router_scale_steps}"
            )

    def scale_at(self, step: int) -> float:
        """Factor of the logits at a step of a run, counted from 0."""
        start, steps = self.router_scale_start, self.router_scale_steps
        if start is None or step >= steps:
            return self.router_scale
        return start * math.pow(self.router_scale / start, step / steps)

    @property
    def has_losses(self) -> bool:
        """Whether routes bear auxiliary losses in training."""
        # (Asked for in each layer's forward pass, so not in a loop over the names.)
        losses = self.aux_loss_coeff or self.z_loss_coeff
        return bool(losses or self.information_coeff or self.evenness_coeff or self.entropy_coeff)

    @property
    def needs_routes_ahead(self) -> bool:
        """Whether these need the routes of the whole step: dense routing chooses every expert anyway."""
        balanced = self.aux_loss_coeff and self.routing == "topk"
        return bool(balanced or self.information_coeff or self.evenness_coeff)
