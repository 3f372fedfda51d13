"""Configuration of the decoder: a pre-norm block with RMSNorm, SwiGLU, RoPE and grouped-query attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parrot_sys.errors import ConfigError
from parrot_sys.models.llm.families import FAMILIES
from parrot_sys.models.llm.family import DecoderFamily
from parrot_sys.models.llm.token_experts import TokenExpertsConfig
from parrot_sys.modules.rotary import RopeScaling

_SIZES = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(kw_only=True, frozen=True, slots=True)
class LLMConfig:
    """Family and sizes of a decoder; the defaults are those of Qwen1.5-7B."""

    family: str = "qwen2"
    """Decoder family: qwen2, qwen3, qwen3_moe, llama."""
    hidden_size: int = 4096
    """H, width of the rows between the blocks."""
    num_layers: int = 32
    """Decoder blocks."""
    num_attention_heads: int = 32
    """Query heads of a block."""
    num_query_groups: int = 32
    """Key/value heads (Hugging Face: num_key_value_heads)."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads when not set."""
    ffn_hidden_size: int = 11008
    """Inner width of the SwiGLU of a block."""
    vocab_size: int = 151936
    """Rows of the embedding and of the LM head; at least the number of the tokenizer's tokens."""
    rope_base: float = 1_000_000.0
    """Base of the rotary position embeddings (Hugging Face: rope_theta)."""
    rope_scaling: RopeScaling | None = None
    """Stretches the long wave lengths, as Llama 3.1 does."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms."""
    max_position_embeddings: int = 32768
    """Most rows (text and image) of a sequence."""
    tie_word_embeddings: bool = False
    """Use the embedding as LM head too."""
    qkv_bias: bool = True
    """Biases on the query, key and value projections, as the family has them: Qwen2 does, Qwen3 and LLaMA do not."""
    experts: TokenExpertsConfig | None = None
    """Experts in the place of a layer's MLP, which each row chooses for itself (family qwen3_moe)."""

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def qk_norm(self) -> bool:
        """RMSNorm over the width of each query and key head."""
        return self.traits.qk_norm

    @property
    def traits(self) -> DecoderFamily:
        """The family with all that it brings."""
        return FAMILIES[self.family]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, has token-routed experts in the place of its MLP."""
        return self.experts is not None and self.experts.in_layer(layer)

    def mlp_weights_of_layer(self, layer: int) -> int:
        """Weights that a row is multiplied with in the MLP of a layer, from 0, or in its experts and their router."""
        if self.experts is None or not self.has_experts(layer):
            return 3 * self.hidden_size * self.ffn_hidden_size
        return self.hidden_size * (3 * self.experts.topk * self.experts.ffn_hidden_size + self.experts.num_experts)

    def tensor_sizes(self) -> dict[str, int]:
        """Sizes that tensor-parallel ranks cut: name -> heads, columns or rows."""
        names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        if self.family == "qwen2" and not self.qkv_bias:
            # Settings of LLaMA that were written before there were families.
            object.__setattr__(self, "family", "llama")
        if self.family not in FAMILIES:
            raise ConfigError(f"llm.family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.qkv_bias != self.traits.qkv_bias:
            raise ConfigError(
                f"llm.qkv_bias must be {str(self.traits.qkv_bias).lower()} with llm.family={self.family}, "
                f"got {str(self.qkv_bias).lower()}"
            )
        self._check_experts()
        for name in (*_SIZES, *(("head_dim",) if self.head_dim is not None else ())):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"llm.{name} must be >= 1, got {size}")
        for name in ("rope_base", "norm_eps"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"llm.{name} must be a finite number > 0, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"llm.num_attention_heads must be a multiple of llm.num_query_groups={self.num_query_groups}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"llm.hidden_size must be a multiple of llm.num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}; or set llm.head_dim"
            )

    def _check_experts(self) -> None:
        experts = self.experts
        if self.traits.token_routed != (experts is not None):
            wanted, got = ("set", "none") if experts is None else ("unset", "experts")
            raise ConfigError(f"llm.experts must be {wanted} with llm.family={self.family}, got {got}")
        if experts is None:
            return
        if max(experts.dense_layers, default=0) >= self.num_layers:
            raise ConfigError(
                f"llm.experts.dense_layers must be < llm.num_layers={self.num_layers}, got {list(experts.dense_layers)}"
            )
        if not any(map(experts.in_layer, range(self.num_layers))):
            raise ConfigError(
                f"llm.experts must be in one layer at least, got none of {self.num_layers} with sparse_step="
                f"{experts.sparse_step} and dense_layers={list(experts.dense_layers)}: use another family"
            )
