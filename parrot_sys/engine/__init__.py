"""Continuous batching: blocks of a paged cache, a scheduler, picture caches, sampling and streaming text."""
