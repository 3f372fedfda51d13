"""Serving: `load_pretrained`, generation, chat and checkpoint conversion."""
