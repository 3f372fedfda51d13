"""Parts for other people's Megatron programs (docs/embedding.md)."""
