"""The order of an epoch: a function of seed, epoch and mix only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that share a weight: those of one language in one data set (with a set ratio, with or without images)."""

    samples: IntArray
    weight: float
    text_only: bool = False
    """Whether they have no image; matters with a set ratio only."""

    @property
    def count(self) -> int:
        """Samples that an epoch takes from the group: size times weight, rounded."""
        return round(self.weight * len(self.samples))


def epoch_length(groups: Sequence[Group], text_ratio: float | None = None) -> int:
    """Samples in every epoch: the sum over the groups of size times weight, each rounded.

    With a `text_ratio`, an epoch is one of the samples with images, and brings that many times as many without.
    """
    if text_ratio is None:
        return sum(group.count for group in groups)
    with_images = sum(group.count for group in groups if not group.text_only)
    return with_images + round(text_ratio * with_images)


def epoch_order(groups: Sequence[Group], seed: int, epoch: int, text_ratio: float | None = None) -> IntArray:
    """Sample numbers of one epoch in their order, int64 [epoch_length].

    A weight of 2.25 takes each sample of the group twice and a random quarter of them a third time, another quarter in
    every epoch. With a `text_ratio`, samples without an image are spread evenly among those with one, so that any
    stretch of the order has that ratio to within one sample; there are as many as it takes, each as often as another.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    if text_ratio is None:
        return _shuffled(groups, stream)
    with_images = _shuffled([group for group in groups if not group.text_only], stream)
    text_only = _shuffled([group for group in groups if group.text_only], stream)
    text_only = np.resize(text_only, round(text_ratio * len(with_images)))
    places = [(np.arange(len(part)) + 0.5) / max(len(part), 1) for part in (with_images, text_only)]
    return np.concatenate((with_images, text_only))[np.argsort(np.concatenate(places), kind="stable")]


def _shuffled(groups: Sequence[Group], stream: np.random.PCG64) -> IntArray:
    """Draws the samples that an epoch takes of the groups, in a random order."""
    parts = []
    for group in groups:
        order = group.samples[_permutation(stream, len(group.samples))]
        parts.append(np.resize(order, group.count))  # repeats the permutation as often as it takes
    samples = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return samples[_permutation(stream, len(samples))]


def _permutation(stream: np.random.PCG64, size: int) -> IntArray:
    """A permutation from raw bits: these, unlike the methods of numpy's Generator, are the same in every numpy."""
    return np.argsort(stream.random_raw(size), kind="stable") if size else np.empty(0, dtype=np.int64)
