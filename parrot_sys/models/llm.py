"""Configuration of the decoder: the Qwen2 block (QKV bias, RMSNorm, SwiGLU, RoPE, grouped-query attention)."""

from __future__ import annotations

from dataclasses import dataclass

from parrot_sys.errors import ConfigError


@dataclass(kw_only=True, frozen=True, slots=True)
class LLMConfig:
    """Sizes of a Qwen2 decoder; the defaults are those of Qwen1.5-7B."""

    hidden_size: int = 4096
    num_layers: int = 32
    num_attention_heads: int = 32
    num_query_groups: int = 32
    """Key/value heads (Hugging Face: num_key_value_heads)."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads when not set."""
    ffn_hidden_size: int = 11008
    vocab_size: int = 151936
    rope_base: float = 1_000_000.0
    norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    qkv_bias: bool = True

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
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
