"""MultiModal-GPT (arXiv 2305.04790): resampler and gated cross-attention of OpenFlamingo 1, with LoRA."""
