"""Configurations of the models and the key maps of their Hugging Face checkpoints; no Megatron."""
