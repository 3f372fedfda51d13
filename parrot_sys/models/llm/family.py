"""DecoderFamily: how one family of decoders differs from the others, and how Hugging Face names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderFamily:
    """A family of pre-norm decoders with RMSNorm, SwiGLU, rotary positions and grouped-query attention."""

    name: str
    """`model_type` of a bare checkpoint; a system's released types end with it (`parrot_qwen2`)."""
    architecture: str
    """In the names of classes: `Qwen2` for `Qwen2ForCausalLM` and `ParrotQwen2ForCausalLM`."""
    qkv_bias: bool
    """Biases on the query, key and value projections."""
    qk_norm: bool = False
    """RMSNorm over the width of each query and key head, before the rotation."""
    token_routed: bool = False
    """Layers have experts that each row chooses among, in the place of an MLP."""
    max_position_embeddings: int
    """Positions where config.json does not name them."""
    refused: tuple[str, ...] = ()
    """Switches of config.json that must be off: they change the block in a way that is not built here."""
