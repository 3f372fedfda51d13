"""Configuration of experts that each row of the decoder chooses for itself, in the place of a layer's MLP."""

from __future__ import annotations

from dataclasses import dataclass

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class TokenExpertsConfig:
    """Token-routed SwiGLU experts; the defaults are those of Qwen3-30B-A3B."""

    num_experts: int = 128
    """Experts of a layer."""
    topk: int = 8
    """Experts that work on a row (Hugging Face: num_experts_per_tok)."""
    ffn_hidden_size: int = 768
    """Inner width of an expert (Hugging Face: moe_intermediate_size)."""
    renormalize: bool = True
    """Divide the weights of the chosen experts by their sum (Hugging Face: norm_topk_prob)."""
    sparse_step: int = 1
    """Every n-th layer has experts, the others an MLP (Hugging Face: decoder_sparse_step)."""
    dense_layers: tuple[int, ...] = ()
    """Layers with an MLP all the same, from 0 (Hugging Face: mlp_only_layers)."""

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, from 0, has experts and not an MLP."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "topk", "ffn_hidden_size", "sparse_step"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"llm.experts.{name} must be >= 1, got {size}")
        if self.topk > self.num_experts:
            raise ConfigError(
                f"llm.experts.topk must be in [1, llm.experts.num_experts={self.num_experts}], got {self.topk}"
            )
        if self.topk == 1 and self.renormalize:
            raise ConfigError(
                "llm.experts.renormalize must be false with llm.experts.topk=1, got true: the weight of a lone expert "
                "would always be 1, and the router could not learn"
            )
        if any(layer < 0 for layer in self.dense_layers) or len(set(self.dense_layers)) < len(self.dense_layers):
            raise ConfigError(
                f"llm.experts.dense_layers must name layers >= 0, each once, got {list(self.dense_layers)}"
            )
