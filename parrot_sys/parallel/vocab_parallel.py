"""LM head and cross entropy with the vocabulary split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.ops import linear_cross_entropy_parts
from parrot_sys.parallel.collectives import all_reduce_max, copy_to_group, reduce_from_group


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_start: int = 0, group: ProcessGroup | None = None
) -> Tensor:
    """Cross entropy of the label rows, [L] float32, the same on every rank of `group`; no [L, vocabulary] logits.

    Args:
        hidden: [L, H], the same on all ranks; its gradient is summed over them.
        weight: [N, H], this rank's rows of the LM head.
        targets: [L] int64, global token ids, the same on all ranks.
        vocab_start: global id of `weight[0]`.
        group: ranks that share the vocabulary; None for one process.
    """
    hidden = copy_to_group(hidden, group)
    lse, target_logits = linear_cross_entropy_parts(hidden, weight, targets, vocab_start=vocab_start)
    return lse - target_logits if group is None else combine_vocab_parts(lse, target_logits, group)


def combine_vocab_parts(lse: Tensor, target_logits: Tensor, group: ProcessGroup) -> Tensor:
    """Cross entropy, [L] float32, from what each rank of `group` knows about its part of the vocabulary.

    Args:
        lse: [L] float32, log of the summed exponentials of this rank's logits.
        target_logits: [L] float32, the target's logit where this rank has it, else 0.
        group: ranks that share the vocabulary.
    """
    top = all_reduce_max(lse, group)
    total, target_logit = reduce_from_group(torch.stack(((lse - top).exp(), target_logits)), group)
    return top + total.log() - target_logit
