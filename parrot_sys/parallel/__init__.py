"""Collectives with autograd and what is built on them; process groups are arguments, None means one process."""

from __future__ import annotations

from parrot_sys.parallel.collectives import all_reduce_max, copy_to_group, gather_from_group, reduce_from_group
from parrot_sys.parallel.context_attention import SharedPack, context_attention, share_pack
from parrot_sys.parallel.row_split import RowSplit
from parrot_sys.parallel.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "RowSplit",
    "SharedPack",
    "all_reduce_max",
    "context_attention",
    "copy_to_group",
    "gather_from_group",
    "reduce_from_group",
    "share_pack",
    "vocab_parallel_linear_cross_entropy",
]
