"""Auxiliary losses of a router, over all rows of a process group.

With a group, statistics are summed over its ranks, so that the value is that of the whole batch and the same on every
rank. The gradient on each rank is the share of its own rows: gradients must be summed over the group (not averaged), as
this package's trainer does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.parallel import reduce_from_group

# n rows (images), E experts


def load_balancing_loss(scores: Tensor, tokens_per_expert: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """`E * sum_e f_e P_e` (Switch Transformer, arXiv 2101.03961, eq. 4): 1 when routing is uniform; 0 without rows.

    Args:
        scores: [n, E], softmax over all experts; P_e is its mean over the rows.
        tokens_per_expert: [E], how many rows chose each expert; f_e is its share of all choices.
        group: ranks whose rows count together.
    """
    num_rows = scores.new_full((1,), scores.shape[0])
    counts = tokens_per_expert.to(scores.dtype)
    statistics = reduce_from_group(torch.cat((scores.sum(dim=0), counts, num_rows)), group)
    score_sum, counts, num_rows = statistics.split((scores.shape[1], scores.shape[1], 1))
    # Ranks, or a whole step, may have no image: clamping makes 0 / 0 a 0 without looking at the values on the host.
    fraction = counts / counts.sum().clamp(min=1)
    return scores.shape[1] * (fraction * score_sum).sum() / num_rows[0].clamp(min=1)


def router_z_loss(lse: Tensor, *, group: ProcessGroup | None = None) -> Tensor:
    """Mean of the squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5); 0 without rows.

    Args:
        lse: [n].
        group: ranks whose rows count together.
    """
    statistics = reduce_from_group(torch.stack((lse.square().sum(), lse.new_tensor(float(lse.shape[0])))), group)
    return statistics[0] / statistics[1].clamp(min=1)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)


def attach_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    """`tensor`; its backward pass also runs that of the scalar `loss`, as if `loss` were added to the final loss.

    For losses that arise where the final loss is out of reach: on an earlier pipeline stage.
    """
    return _AttachLoss.apply(tensor, loss)
