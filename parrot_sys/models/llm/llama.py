"""LLaMA to Llama 3.3 (arXiv 2302.13971, 2407.21783); Llama 3.1 stretches its wave lengths (`rope_scaling`)."""

from parrot_sys.models.llm.family import DecoderFamily

FAMILY = DecoderFamily(
    name="llama",
    architecture="Llama",
    qkv_bias=False,
    max_position_embeddings=2_048,
    refused=("attention_bias", "mlp_bias"),
)
