"""Loads of ranks that share experts, when the choices fall at random."""

from __future__ import annotations

import math


def expected_imbalance(ranks: int, choices: float) -> float:
    """Largest over mean load when `choices` images fall on `ranks` ranks at random, each with the same probability.

    The loads are taken for independent Poisson variables of mean m = choices / ranks: E[max] = sum over k of
    1 - P(load <= k)^ranks. A batch of one language, or a router that prefers some experts, is worse.
    """
    if ranks == 1 or choices <= 0:
        return 1.0
    mean = choices / ranks
    probability, below, expected = math.exp(-mean), 0.0, 0.0
    if probability == 0.0:  # a mean above 700: the normal limit
        return 1 + math.sqrt(2 * math.log(ranks) / mean)
    for load in range(int(mean + 12 * math.sqrt(mean) + 24)):
        below += probability
        expected += 1 - min(below, 1.0) ** ranks
        probability *= mean / (load + 1)
    return expected / mean


def ranks_of_choices(num_experts: int, ranks: int, topk: int) -> float:
    """Ranks that hold at least one of `topk` experts drawn at random, each expert as likely: those an image goes to."""
    elsewhere = num_experts - num_experts // ranks
    return ranks * (1 - math.comb(elsewhere, topk) / math.comb(num_experts, topk))
