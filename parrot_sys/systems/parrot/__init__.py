"""Parrot (arXiv 2406.02539): text-guided experts between projector and decoder."""
