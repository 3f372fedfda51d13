"""The order of samples: a function of seed, place and mix only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from parrot_sys.data.mix_config import Mix

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that share a weight: those of one language in one data set (with a set ratio, with or without images)."""

    samples: IntArray
    weight: float
    text_only: bool = False
    """Whether they have no image; matters with a set ratio only."""
    data_set: str = ""
    language: str = ""

    @property
    def count(self) -> int:
        """Samples that an epoch takes from the group: size times weight, rounded."""
        return round(self.weight * len(self.samples))


def mixed(groups: Sequence[Group], mix: Mix) -> list[Group]:
    """The groups with the weights of a mix: those of their set and language, then temperature, then caps."""
    weighted = [replace(group, weight=mix.weight(group.data_set, group.language)) for group in groups]
    if mix.alpha != 1.0:
        weighted = _tempered(weighted, mix.alpha)
    for name, cap in mix.caps.items():
        weighted = _capped(weighted, cap, lambda group, name=name: group.data_set == name)  # type: ignore[misc]
    for name, cap in mix.language_caps.items():
        weighted = _capped(weighted, cap, lambda group, name=name: group.language == name)  # type: ignore[misc]
    return weighted


def _tempered(groups: Sequence[Group], alpha: float) -> list[Group]:
    """Languages with shares in proportion to their size ** alpha; the size of the whole stays."""
    sizes: dict[str, float] = {}
    for group in groups:
        sizes[group.language] = sizes.get(group.language, 0.0) + group.weight * len(group.samples)
    present = {language: size for language, size in sizes.items() if size > 0}
    total, largest = sum(present.values()), max(present.values(), default=1.0)
    powers = {language: (size / largest) ** alpha for language, size in present.items()}
    scale = total / sum(powers.values()) if powers else 0.0
    factors = {language: scale * powers[language] / size for language, size in present.items()}
    return [replace(group, weight=group.weight * factors.get(group.language, 0.0)) for group in groups]


def _capped(groups: Sequence[Group], cap: int, belongs: Callable[[Group], bool]) -> list[Group]:
    """The groups that belong together scaled down to `cap` samples an epoch, where they have more."""
    counts = np.array([group.count if belongs(group) else 0 for group in groups], dtype=np.int64)
    if (total := int(counts.sum())) <= cap:
        return list(groups)
    exact = [int(count) * cap for count in counts]
    shares = np.array([value // total for value in exact])
    rests = np.array([value % total for value in exact])
    shares[np.argsort(-rests, kind="stable")[: cap - int(shares.sum())]] += 1  # the largest remainders
    return [
        replace(group, weight=int(share) / max(len(group.samples), 1)) if belongs(group) else group
        for group, share in zip(groups, shares, strict=True)
    ]


class SampleOrder:
    """Sample numbers epoch after epoch, also where the mix changes on the way.

    An epoch always has the length of the first mix's. From the sample at which a stage begins, the order is that of
    whole rounds of the stage's own mix, one after the other, each in an order of its own.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[Group]]], seed: int, text_ratio: float | None) -> None:
        """
        Args:
            stages: number of the sample at which each begins, rising from 0, and its groups.
            seed: see `epoch_order`.
            text_ratio: see `epoch_order`.
        """
        self._stages, self._seed, self._text_ratio = stages, seed, text_ratio
        self._lengths = [epoch_length(groups, text_ratio) for _, groups in stages]

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._lengths[0]

    def epoch(self, number: int) -> IntArray:
        """Sample numbers of an epoch in their order, int64 [len(self)]."""
        start, end = number * len(self), (number + 1) * len(self)
        bounds = [begin for begin, _ in self._stages] + [end]
        parts = [
            self._of_stage(stage, max(start, begin) - begin, min(end, bounds[stage + 1]) - begin)
            for stage, (begin, _) in enumerate(self._stages)
            if max(start, begin) < min(end, bounds[stage + 1])
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def first_round(self, stage: int) -> IntArray:
        """Sample numbers of the first round of a stage."""
        return self._of_stage(stage, 0, self._lengths[stage])

    def _of_stage(self, stage: int, start: int, end: int) -> IntArray:
        """Samples `start` to `end` of a stage, counted from its beginning."""
        length, groups = self._lengths[stage], self._stages[stage][1]
        first, last = start // length, -(-end // length)
        orders = [epoch_order(groups, self._seed, i, self._text_ratio, stage) for i in range(first, last)]
        return np.concatenate(orders)[start - first * length : end - first * length]


def epoch_length(groups: Sequence[Group], text_ratio: float | None = None) -> int:
    """Samples in every epoch: the sum over the groups of size times weight, each rounded.

    With a `text_ratio`, an epoch is one of the samples with images, and brings that many times as many without.
    """
    if text_ratio is None:
        return sum(group.count for group in groups)
    with_images = sum(group.count for group in groups if not group.text_only)
    return with_images + round(text_ratio * with_images)


def epoch_order(
    groups: Sequence[Group], seed: int, epoch: int, text_ratio: float | None = None, stage: int = 0
) -> IntArray:
    """Sample numbers of one epoch in their order, int64 [epoch_length].

    A weight of 2.25 takes each sample of the group twice and a random quarter of them a third time, another quarter in
    every epoch. With a `text_ratio`, samples without an image are spread evenly among those with one, so that any
    stretch of the order has that ratio to within one sample; there are as many as it takes, each as often as another.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed, epoch, stage] if stage else [seed, epoch]))
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
        order = group.samples[permutation(stream, len(group.samples))]
        parts.append(np.resize(order, group.count))  # repeats the permutation as often as it takes
    samples = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return samples[permutation(stream, len(samples))]


def permutation(stream: np.random.PCG64, size: int) -> IntArray:
    """A permutation from raw bits: these, unlike the methods of numpy's Generator, are the same in every numpy."""
    return np.argsort(stream.random_raw(size), kind="stable") if size else np.empty(0, dtype=np.int64)
