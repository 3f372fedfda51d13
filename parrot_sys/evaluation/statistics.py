"""Intervals and paired tests for answers that are not independent: rotations and languages ask about one picture.

Answers of one *cluster* depend on each other, clusters do not. Accuracies get Wilson's interval with an effective
number of answers, which follows from the variance between clusters, and with Student's t. Differences get the exact
test that exchanges the two models within whole clusters: McNemar's exact test where every cluster holds one answer.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_LEVEL = 0.95
_LARGEST_EXACT = 200_000_000
"""Additions up to which the paired test enumerates; beyond, it draws."""
_DRAWS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Two models' answers to the same questions."""

    n: int
    """Pairs of answers."""
    first_only: int
    """Pairs in which the first value is larger: where values are right or wrong, only the first model is right."""
    second_only: int
    clusters: int
    difference: float
    """Mean of first minus second."""
    p: float
    """Two-sided, of the hypothesis that first and second are exchangeable within each cluster."""

    @property
    def discordant(self) -> int:
        """Pairs that differ."""
        return self.first_only + self.second_only


def join_clusters(keys: Iterable[Sequence[Hashable]]) -> NDArray[np.int64]:
    """Numbers of clusters, 0.. in order of appearance: two answers with a key in common are in the same one.

    Args:
        keys: for each answer all that it may share with others, such as its picture and its question; at least one.
    """
    parents: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    first = []
    for own in keys:
        first.append(own[0])
        for key in own:
            parents[root(key)] = root(own[0])
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(root(key), len(numbers)) for key in first], dtype=np.int64)


def accuracy_interval(
    right: Sequence[int] | NDArray[np.int64], clusters: NDArray[np.int64], strata: Sequence[int] | None = None
) -> tuple[float, float] | None:
    """95% interval of an accuracy, in percent; None without answers.

    Args:
        right: 0 or 1 for each answer.
        clusters: number of its cluster, from `join_clusters`.
        strata: number of its group (such as its language), 0..; the accuracy is then the unweighted mean over groups.

    Where all answers are right, or all wrong, nothing shows how far they depend on each other: each cluster then counts
    as one answer. One cluster says nothing about others: the interval is 0 to 100.
    """
    values = np.asarray(right, dtype=np.float64)
    if not len(values):
        return None
    groups = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    counts = np.bincount(groups)
    means = np.bincount(groups, values) / counts
    estimate = float(means.mean())
    sums = np.bincount(clusters, (values - means[groups]) / (counts[groups] * len(counts)))
    number = len(sums)
    if number < 2:
        return 0.0, 100.0
    variance = float(sums @ sums) * number / (number - 1)
    spread = estimate * (1 - estimate)
    if spread <= 0:
        effective = float(number)
    else:
        # Fewer answers than there are, never more: rotations may vary less than independent answers would.
        effective = min(float(len(values)), spread / variance) if variance > 0 else float(len(values))
    low, high = _wilson(estimate, effective, _critical(number - 1))
    return 100 * low, 100 * high


def mean_margin(values: Sequence[float], clusters: NDArray[np.int64]) -> float:
    """Half of the 95% interval of a mean; infinite for a single value, or a single cluster of values that differ."""
    array = np.asarray(values, dtype=np.float64)
    sums = np.bincount(clusters, array - array.mean()) / len(array)
    if (number := len(sums)) < 2:
        return 0.0 if len(array) > 1 and np.ptp(array) == 0 else math.inf
    return _critical(number - 1) * math.sqrt(float(sums @ sums) * number / (number - 1))


def two_way_margin(values: Sequence[float], clusters: NDArray[np.int64], runs: NDArray[np.int64]) -> float:
    """Half of the 95% interval of a mean whose values share both clusters (pictures) and runs (seeds).

    The variance is that between clusters plus that between runs less what both count (Cameron, Gelbach and Miller),
    and never less than the larger of the two; the degrees of freedom are Satterthwaite's. With few runs that differ
    the interval is wide: Student's t of three seeds is 4.3. One run shows nothing of others: `mean_margin`.

    Args:
        values: of each answer, such as the difference between two models.
        clusters: number of the cluster of each, from `join_clusters`.
        runs: number of the training run of each, 0..
    """
    if runs.max(initial=0) == 0:
        return mean_margin(values, clusters)
    array = np.asarray(values, dtype=np.float64)
    residuals = (array - array.mean()) / len(array)
    both = clusters * (int(runs.max()) + 1) + runs
    own = [_between(residuals, each) for each in (clusters, runs)]
    if any(number < 2 for _, number in own):
        return mean_margin(values, clusters)
    total = max(own[0][0] + own[1][0] - _between(residuals, both)[0], own[0][0], own[1][0])
    parts = sum(variance**2 / (number - 1) for variance, number in own)
    return 0.0 if total <= 0 else _t(total**2 / parts) * math.sqrt(total)


def _between(residuals: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float, int]:
    """(variance of a sum of residuals from that between groups, number of groups)."""
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], residuals)
    number = len(sums)
    return float(sums @ sums) * number / max(1, number - 1), number


def _t(dof: float) -> float:
    """Quantile of Student's t for degrees of freedom that need not be whole; between whole ones linear in 1 / dof."""
    low = max(1, math.floor(dof))
    share = (1 / low - 1 / max(dof, low)) / (1 / low - 1 / (low + 1))
    return (1 - share) * _critical(low) + share * _critical(low + 1)


def paired_test(
    first: Sequence[int] | NDArray[np.int64], second: Sequence[int] | NDArray[np.int64], clusters: NDArray[np.int64]
) -> Paired:
    """Compares two models on the same questions.

    Args:
        first: a whole number for each question: right or wrong, or a count.
        second: those of the other model.
        clusters: number of each question's cluster, from `join_clusters`.
    """
    differences = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    sums = np.zeros(int(clusters.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(sums, clusters, differences)
    return Paired(
        n=len(differences),
        first_only=int((differences > 0).sum()),
        second_only=int((differences < 0).sum()),
        clusters=len(sums),
        difference=float(differences.mean()) if len(differences) else math.nan,
        p=_exchange(np.abs(sums[sums != 0]), abs(int(differences.sum()))),
    )


def _exchange(sizes: NDArray[np.int64], observed: int) -> float:
    """P(|sum of sizes with random signs| >= observed): exact, or drawn (with a fixed seed) where that would be long."""
    total = int(sizes.sum())
    if len(sizes) * (total + 1) > _LARGEST_EXACT:
        generator = np.random.default_rng(0)
        draws = [abs(int(sizes @ generator.choice([-1, 1], len(sizes)))) >= observed for _ in range(_DRAWS)]
        return (1 + sum(draws)) / (1 + _DRAWS)
    chances = np.ones(1)  # of each number of units that got a plus; a size moves all its units together
    for size in sizes.tolist():
        longer = np.zeros(len(chances) + size)
        longer[: len(chances)] += chances / 2
        longer[size:] += chances / 2
        chances = longer
    reached = np.abs(2 * np.arange(total + 1) - total) >= observed
    return min(1.0, float(chances[reached].sum()))


def _wilson(share: float, n: float, critical: float) -> tuple[float, float]:
    weight = critical**2 / n
    center = (share + weight / 2) / (1 + weight)
    half = critical / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return 0.0 if share <= 0 else max(0.0, center - half), 1.0 if share >= 1 else min(1.0, center + half)


@lru_cache(maxsize=4096)
def _critical(dof: int) -> float:
    """Quantile of Student's t that leaves 2.5% above it."""
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    if dof > 300:  # Cornish and Fisher's expansion, right to 1e-8 here
        return z + (z**3 + z) / (4 * dof) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, dof) < _LEVEL else (low, middle)
    return math.sqrt(dof) * math.tan(low)


def _central(angle: float, dof: int) -> float:
    """P(|t| < sqrt(dof) tan(angle)); Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term = total = cosine if odd else 1.0
    for step in range(2 + odd, dof - 1, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    if odd:
        return 2 / math.pi * (angle + (sine * total if dof > 1 else 0.0))
    return sine * total
