"""Collectives with autograd and what is built on them; process groups are arguments, None means one process."""

from __future__ import annotations

from parrot_sys.parallel.collectives import (
    all_gather_rows,
    all_reduce_max,
    copy_to_group,
    reduce_from_group,
    split_counts,
)
from parrot_sys.parallel.context_attention import SharedPack, context_attention, share_pack
from parrot_sys.parallel.row_split import RowSplit
from parrot_sys.parallel.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "RowSplit",
    "SharedPack",
    "all_gather_rows",
    "all_reduce_max",
    "context_attention",
    "copy_to_group",
    "reduce_from_group",
    "share_pack",
    "split_counts",
    "vocab_parallel_linear_cross_entropy",
]
