"""Qwen1.5, Qwen2 and Qwen2.5 (arXiv 2407.10671)."""

from parrot_sys.models.llm.family import DecoderFamily

FAMILY = DecoderFamily(
    name="qwen2",
    architecture="Qwen2",
    qkv_bias=True,
    max_position_embeddings=32_768,
    refused=("use_sliding_window",),
)
