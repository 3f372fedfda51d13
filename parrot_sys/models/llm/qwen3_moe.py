"""Qwen3 with token-routed experts (arXiv 2505.09388): Qwen3-30B-A3B, Qwen3-235B-A22B."""

from parrot_sys.models.llm.family import DecoderFamily

FAMILY = DecoderFamily(
    name="qwen3_moe",
    architecture="Qwen3Moe",
    qkv_bias=False,
    qk_norm=True,
    token_routed=True,
    max_position_embeddings=32_768,
    # (transformers adds its load-balancing loss only with `output_router_logits`.)
    refused=("use_sliding_window", "attention_bias", "output_router_logits"),
)
