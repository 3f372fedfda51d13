"""LLaVA (arXiv 2310.03744) and LLaVA-NeXT: a projector alone between tower and decoder; pictures may become tiles."""
