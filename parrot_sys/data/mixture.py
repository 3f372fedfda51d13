"""The order of an epoch: a function of seed, epoch and mix only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that share a weight: those of one language in one data set."""

    samples: IntArray
    weight: float

    @property
    def count(self) -> int:
        """Samples that an epoch takes from the group: size times weight, rounded."""
        return round(self.weight * len(self.samples))


def epoch_length(groups: Sequence[Group]) -> int:
    """Samples in every epoch: the sum over the groups of size times weight, each rounded."""
    return sum(group.count for group in groups)


def epoch_order(groups: Sequence[Group], seed: int, epoch: int) -> IntArray:
    """Sample numbers of one epoch in their order, int64 [epoch_length].

    A weight of 2.25 takes each sample of the group twice and a random quarter of them a third time, another quarter in
    every epoch.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    parts = []
    for group in groups:
        order = group.samples[_permutation(stream, len(group.samples))]
        parts.append(np.resize(order, group.count))  # repeats the permutation as often as it takes
    samples = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return samples[_permutation(stream, len(samples))]


def _permutation(stream: np.random.PCG64, size: int) -> IntArray:
    """A permutation from raw bits: these, unlike the methods of numpy's Generator, are the same in every numpy."""
    return np.argsort(stream.random_raw(size), kind="stable") if size else np.empty(0, dtype=np.int64)
