"""Auxiliary losses of TextGuidedMoE over the images of a global batch, in one forward pass or in shares of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parrot_sys.modules.losses import load_balancing_loss, router_z_loss
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.ops import TopKRouting
from parrot_sys.parallel import all_gather_rows, gather_counts, reduce_from_group

# n images, E experts, A languages

UNKNOWN = -1
"""Language of an image whose record states none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTotals:
    """Statistics over all images of a training step: those of every micro-batch on every data-parallel rank."""

    num_images: Tensor  # 0-d float64
    tokens_per_expert: Tensor  # [E] float64, images that chose each expert
    means: Tensor  # [E] float64, mean of the router's scores
    languages: Tensor  # [A] float64, ascending
    language_means: Tensor  # [A, E] float64, mean scores of the images in each language

    @staticmethod
    def of(rows: Tensor) -> RoutingTotals:
        """From the `routing_rows` of all images."""
        languages, chosen, scores = rows.tensor_split([1, 1 + rows.shape[1] // 2], dim=1)
        names, numbers, counts = languages[:, 0].unique(return_inverse=True, return_counts=True)
        sums = scores.new_zeros((len(names), scores.shape[1])).index_add_(0, numbers, scores)
        return RoutingTotals(
            num_images=scores.new_tensor(len(rows)),
            tokens_per_expert=chosen.sum(dim=0),
            means=scores.sum(dim=0) / max(len(rows), 1),
            languages=names,
            language_means=sums / counts[:, None],
        )

    @staticmethod
    def of_dense(num_images: Tensor, num_experts: int) -> RoutingTotals:
        """Totals that need no look at the routes: dense routing chooses every expert."""
        nothing = num_images.new_zeros((0, num_experts), dtype=torch.float64)
        return RoutingTotals(
            num_images=num_images.double(),
            tokens_per_expert=num_images.double().expand(num_experts),
            means=nothing.sum(dim=0),
            languages=nothing[:, 0],
            language_means=nothing,
        )


def routing_rows(routing: TopKRouting, languages: Tensor) -> Tensor:
    """[n, 1 + 2 E] float64 of n images: language, which experts they chose, and their scores.

    Args:
        routing: of the images.
        languages: [n], a number below 2^53 for each language, or UNKNOWN.
    """
    chosen = torch.zeros_like(routing.scores).scatter_(1, routing.topk_indices, 1.0)
    return torch.cat((languages[:, None].double(), chosen.double(), routing.scores.detach().double()), dim=1)


def gather_routing_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks."""
    return all_gather_rows(rows, gather_counts(len(rows), group, rows.device), group)


def auxiliary_losses(
    config: TextGuidedMoEConfig,
    logits: Tensor,
    routing: TopKRouting,
    languages: Tensor | None,
    *,
    totals: RoutingTotals | None,
    group: ProcessGroup | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Losses of the distribution of routes, added up, and z-loss, times their coefficients; None where these are 0.

    Args:
        config: coefficients.
        logits: [n, E] of n images.
        routing: what they chose.
        languages: [n], see `routing_rows`; all unknown when not given.
        totals: of the whole step; the losses are then the share of these images.
        group: ranks whose images count together where there are no totals.
    """
    losses = []
    if config.aux_loss_coeff:
        losses.append(config.aux_loss_coeff * _balance(config, routing, totals, group))
    if config.entropy_coeff:
        losses.append(config.entropy_coeff * _entropy(logits, totals, group))
    if config.information_coeff or config.evenness_coeff:
        if languages is None:
            languages = routing.topk_indices.new_full((len(logits),), UNKNOWN)
        known = totals or RoutingTotals.of(gather_routing_rows(routing_rows(routing, languages), group))
        share = _share(config, logits, routing.scores, languages, known)
        losses.append(share if totals is not None else reduce_from_group(share, group))
    z_loss = None
    if config.z_loss_coeff:
        if totals is None:
            z_mean = router_z_loss(routing.lse, group=group)
        else:
            z_mean = routing.lse.square().sum() / totals.num_images.to(routing.lse).clamp(min=1)
        z_loss = config.z_loss_coeff * z_mean
    return (torch.stack(losses).sum() if losses else None), z_loss


def _balance(
    config: TextGuidedMoEConfig, routing: TopKRouting, totals: RoutingTotals | None, group: ProcessGroup | None
) -> Tensor:
    if totals is None:
        return load_balancing_loss(routing.scores, routing.tokens_per_expert, group=group)
    counts = totals.tokens_per_expert.to(routing.scores)
    fraction = counts / counts.sum().clamp(min=1)
    images = totals.num_images.to(routing.scores).clamp(min=1)
    return config.num_experts * (fraction * routing.scores.sum(0)).sum() / images


def _entropy(logits: Tensor, totals: RoutingTotals | None, group: ProcessGroup | None) -> Tensor:
    """Mean entropy of an image's own scores, or the share of these images in it."""
    logs = logits.log_softmax(-1)
    own = -(logs.exp() * logs).sum()
    if totals is not None:
        return own / totals.num_images.to(own).clamp(min=1)
    together = reduce_from_group(torch.stack((own, own.new_tensor(float(len(logits))))), group)
    return together[0] / together[1].clamp(min=1)


def _share(
    config: TextGuidedMoEConfig, logits: Tensor, scores: Tensor, languages: Tensor, totals: RoutingTotals
) -> Tensor:
    """Share of some images in the losses that read means over all images, which are constants in it."""
    means, images = totals.means.to(scores), totals.num_images.to(scores).clamp(min=1)
    loss = scores.new_zeros(())
    if config.information_coeff:
        loss = loss - config.information_coeff * _information(scores, languages, totals)
    if config.evenness_coeff:
        loss = loss + config.evenness_coeff * ((means - 1 / config.num_experts) * logits).sum()
    return loss / images


def _information(scores: Tensor, languages: Tensor, totals: RoutingTotals) -> Tensor:
    """I(expert; language) in nats times the number of all images, of which one without a language has its own.

    It is the sum over images i of `sum_e p_ie log(m_le / m_e)`, with m_l the mean scores of the language of i and m
    that of all. The gradients of the means cancel: `sum_i p_ie / m_le` is the same for every expert, and the scores of
    an image sum to 1. So each image has its share with the means as constants.
    """
    own = scores.detach()
    if len(totals.languages):
        of_language = totals.language_means[torch.searchsorted(totals.languages, languages.double())].to(own)
        own = torch.where(languages[:, None] == UNKNOWN, own, of_language)
    tiny = torch.finfo(own.dtype).tiny
    return (scores * (own.clamp(min=tiny).log() - totals.means.to(own).clamp(min=tiny).log())).sum()
