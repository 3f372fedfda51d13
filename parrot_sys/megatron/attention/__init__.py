"""Attention of packed samples: contexts, cores, caches, and the memories that layers read."""
