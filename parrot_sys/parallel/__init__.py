"""Collectives with autograd and what is built on them; process groups are arguments, None means one process."""

from __future__ import annotations

from parrot_sys.parallel.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_to_all_rows,
    copy_to_group,
    gather_counts,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_rows,
    split_counts,
    split_to_group,
)
from parrot_sys.parallel.context_attention import SharedPack, context_attention, share_pack
from parrot_sys.parallel.image_dispatch import Dispatch, ExpertGroups, check_experts, dispatch_images
from parrot_sys.parallel.row_split import RowSplit
from parrot_sys.parallel.vocab_parallel import combine_vocab_parts, vocab_parallel_linear_cross_entropy

__all__ = [
    "Dispatch",
    "ExpertGroups",
    "RowSplit",
    "SharedPack",
    "all_gather_rows",
    "all_reduce_max",
    "all_to_all_rows",
    "check_experts",
    "combine_vocab_parts",
    "context_attention",
    "copy_to_group",
    "dispatch_images",
    "gather_counts",
    "gather_from_group",
    "reduce_from_group",
    "reduce_scatter_rows",
    "share_pack",
    "split_counts",
    "split_to_group",
    "vocab_parallel_linear_cross_entropy",
]
