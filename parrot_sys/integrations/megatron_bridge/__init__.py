"""Megatron-Bridge: checkpoints of Hugging Face to and from Megatron models with our router and experts."""
