"""Auxiliary losses of routing in plain PyTorch, each from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import RoutingOutput

COEFFICIENTS = ("aux_loss_coeff", "z_loss_coeff", "information_coeff", "evenness_coeff", "entropy_coeff")


def auxiliary_losses(routes: Sequence[RoutingOutput], languages: Sequence[Tensor], moe: TextGuidedMoEConfig) -> Tensor:
    """Their weighted sum over the images of all micro-batches."""
    logits, probs = (torch.cat([getattr(route, name) for route in routes]) for name in ("logits", "probs"))
    shares = (probs > 0).float().sum(0) / (probs > 0).sum()
    balance = moe.num_experts * (shares * logits.softmax(-1).mean(0)).sum()
    scores, names = logits.softmax(-1), torch.cat(list(languages))

    def entropy(rows: Tensor) -> Tensor:
        mean = rows.mean(0)
        return -(mean * mean.log()).sum()

    # Without a language, each image has one of its own.
    groups = [scores[names == name] for name in set(names.tolist()) - {-1}]
    groups += [row[None] for row in scores[names == -1]]
    information = entropy(scores) - sum(len(rows) / len(scores) * entropy(rows) for rows in groups)
    z_loss = logits.logsumexp(-1).square().mean()
    evenness = ((scores.mean(0).detach() - 1 / moe.num_experts) * logits.mean(0)).sum()
    losses = {"aux_loss": balance, "z_loss": z_loss, "information": -information, "evenness": evenness}
    losses["entropy"] = sum(entropy(row[None]) for row in scores) / len(scores)
    return sum(getattr(moe, f"{name}_coeff") * loss for name, loss in losses.items())
