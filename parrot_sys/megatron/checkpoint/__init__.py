"""Training checkpoints: written by every rank, verified, read on any layout."""
