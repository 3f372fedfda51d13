"""Collectives with autograd and what is built on them; process groups are arguments, None means one process."""

from __future__ import annotations

from parrot_sys.parallel.collectives import all_reduce_max, copy_to_group, reduce_from_group
from parrot_sys.parallel.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = ["all_reduce_max", "copy_to_group", "reduce_from_group", "vocab_parallel_linear_cross_entropy"]
