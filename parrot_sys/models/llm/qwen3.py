"""Qwen3 (arXiv 2505.09388), dense: norms of queries and keys, heads of a width of their own, no biases."""

from parrot_sys.models.llm.family import DecoderFamily

FAMILY = DecoderFamily(
    name="qwen3",
    architecture="Qwen3",
    qkv_bias=False,
    qk_norm=True,
    max_position_embeddings=32_768,
    refused=("use_sliding_window", "attention_bias"),
)
