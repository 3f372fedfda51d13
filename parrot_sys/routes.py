"""Routes in numbers: what the choice of expert tells of a picture's language or category, and how experts are used.

The *share* of an expert in an image is its routing weight over the sum of the image's weights. The information
I(expert; label) in bits is the mutual information of the expert that the shares would draw and the label of an image
(its language, the category of its picture): 0 when routes say nothing about the label, and at most the entropy of the
labels and that of the experts.

Few images show some information by chance. The baseline is the mean of I over all permutations of the labels, to second
order in the shares: with A labels on n images, `(A - 1) / (2 n ln 2) * sum_e var_e / mean_e` of the shares, which is
the bias of Miller and Madow when each image has one expert. It needs sums only, so that ranks and steps add up.
The sums are of integers (multiples of 2^-32): they are the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parrot_sys.markdown_tables import fixed

Array = NDArray[np.float64]
Sums = NDArray[np.int64]

DEAD_BELOW = 0.1
"""An expert with less than this part of an equal share is called dead."""
_DRAWS = 999
_UNIT = 2.0**32

# n images, E experts, A labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """Information on a label in the choice of expert."""

    bits: float
    """I(expert; label)."""
    by_chance: float
    """Its mean when the labels are permuted."""
    most: float
    """The entropy of the labels, which it cannot exceed."""
    n: int
    """Images, or pictures where several answers about one count once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """How the experts are used, over all images."""

    shares: tuple[float, ...]
    """Mean share of each expert."""
    entropy: float
    """H(expert) of these means in bits: `most` where all are used alike, 0 where one takes all."""
    image_entropy: float
    """Mean entropy of an image's own shares in bits: `most` where routes are uniform, 0 where one expert has all."""

    @property
    def most(self) -> float:
        """Entropy of equal shares."""
        return math.log2(len(self.shares))

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts, counted from 1, with less than `DEAD_BELOW` of an equal share."""
        return dead_experts(self.shares)


@dataclass(slots=True)
class _Labelled:
    """Sums over the images that have a label of one kind."""

    counts: dict[str, int] = field(default_factory=dict)
    """Label -> its images."""
    shares: dict[str, Sums] = field(default_factory=dict)
    """Label -> [E], sum of their shares."""
    squares: Sums | int = 0
    """[E], sum of squared shares over all labels."""

    def add(self, shares: Array, labels: Sequence[str]) -> None:
        names = np.asarray(labels, dtype=object)
        for label in sorted(set(labels) - {""}):
            rows = shares[names == label]
            self._add(label, len(rows), _fixed(rows).sum(axis=0), _fixed(np.square(rows)).sum(axis=0))

    def _add(self, label: str, count: int, shares: Sums, squares: Sums | int) -> None:
        self.counts[label] = self.counts.get(label, 0) + count
        self.shares[label] = self.shares.get(label, 0) + shares
        self.squares = self.squares + squares

    def merge(self, other: _Labelled) -> None:
        for label, count in other.counts.items():
            self._add(label, count, other.shares[label], 0)
        self.squares = self.squares + other.squares

    def information(self) -> Information | None:
        if len(self.counts) < 2:
            return None
        labels = sorted(self.counts)
        counts = np.array([self.counts[label] for label in labels])
        joint = np.stack([self.shares[label] for label in labels]) / _UNIT
        n = int(counts.sum())
        means = joint.sum(axis=0) / n
        variances = np.maximum(self.squares / _UNIT / n - np.square(means), 0.0) * n / max(n - 1, 1)
        used = means > 0
        return Information(
            bits=max(mutual_information(joint), 0.0),
            by_chance=(len(labels) - 1) * float((variances[used] / means[used]).sum()) / (2 * n * math.log(2)),
            most=entropy(counts / n),
            n=n,
        )


class RouteSums:
    """Sums over the routes of images; those of other steps, micro-batches and ranks add up in any order."""

    def __init__(self) -> None:
        self.images = 0
        self._shares: Sums | int = 0
        self._entropy = 0
        self._labelled: dict[str, _Labelled] = {}

    def add(self, weights: ArrayLike, labels: Mapping[str, Sequence[str]]) -> None:
        """Takes in some images.

        Args:
            weights: [n, E] routing weights, at least one of an image above 0.
            labels: kind (`language`, `category`) -> label of each image, empty where it is not known.
        """
        shares = as_shares(weights)
        if not len(shares):
            return
        self.images += len(shares)
        self._shares = self._shares + _fixed(shares).sum(axis=0)
        self._entropy += int(_fixed(_entropies(shares)).sum())
        for kind, each in labels.items():
            if any(each):
                self._labelled.setdefault(kind, _Labelled()).add(shares, each)

    def merge(self, other: RouteSums, kinds: Collection[str] | None = None) -> None:
        """Adds the sums of `other`, of labels those of these kinds; None is all kinds."""
        self.images += other.images
        self._shares = self._shares + other._shares
        self._entropy += other._entropy
        for kind, labelled in other._labelled.items():
            if kinds is None or kind in kinds:
                self._labelled.setdefault(kind, _Labelled()).merge(labelled)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of labels that any image had."""
        return tuple(sorted(self._labelled))

    def information(self, kind: str) -> Information | None:
        """I(expert; label of this kind); None where fewer than two labels occur."""
        return self._labelled[kind].information() if kind in self._labelled else None

    def means(self, kind: str) -> dict[str, Array]:
        """Label of this kind -> [E], mean share of each expert; the label of images that have none is empty."""
        known = self._labelled.get(kind, _Labelled())
        found = {label: total / _UNIT / known.counts[label] for label, total in known.shares.items()}
        if rest := self.images - sum(known.counts.values()):
            found[""] = np.asarray(self._shares - sum(known.shares.values())) / _UNIT / rest
        return found

    def usage(self) -> Usage | None:
        """How the experts are used; None without images."""
        if not self.images:
            return None
        means = np.asarray(self._shares) / _UNIT / self.images
        return Usage(
            shares=tuple(means.tolist()),
            entropy=entropy(means),
            image_entropy=self._entropy / _UNIT / self.images,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `load_state_dict`."""
        return {
            "images": self.images,
            "shares": np.asarray(self._shares).tolist(),
            "entropy": self._entropy,
            "labelled": {
                kind: {
                    "counts": dict(each.counts),
                    "shares": {label: total.tolist() for label, total in each.shares.items()},
                    "squares": np.asarray(each.squares).tolist(),
                }
                for kind, each in self._labelled.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on adding to the sums of `state`."""
        self.images, self._entropy = state["images"], state["entropy"]
        self._shares = np.array(state["shares"], dtype=np.int64)
        self._labelled = {
            kind: _Labelled(
                counts=dict(each["counts"]),
                shares={label: np.array(total, dtype=np.int64) for label, total in each["shares"].items()},
                squares=np.array(each["squares"], dtype=np.int64),
            )
            for kind, each in state["labelled"].items()
        }


def dead_experts(shares: Sequence[float], below: float = DEAD_BELOW) -> tuple[int, ...]:
    """Experts, counted from 1, with less than this part of an equal share."""
    return tuple(e for e, share in enumerate(shares, 1) if share * len(shares) < below)


def usage_text(entropy_bits: float, most: float, dead: Sequence[int]) -> str:
    """H(expert), its most, and the dead experts by number, in a sentence."""
    numbers = ", ".join(map(str, dead)) or "none"
    return f"H(expert) {fixed(entropy_bits, 2)} of {fixed(most, 2)} bits; dead experts: {numbers}"


def as_shares(weights: ArrayLike) -> Array:
    """[n, E], weights over their sums."""
    rows = np.asarray(weights, dtype=np.float64)
    return rows / rows.sum(axis=1, keepdims=True) if rows.size else rows


def entropy(probabilities: ArrayLike) -> float:
    """Entropy in bits of probabilities that sum to 1."""
    return float(_entropies(np.asarray(probabilities, dtype=np.float64)[None])[0])


def mutual_information(joint: ArrayLike) -> float:
    """Mutual information in bits of rows and columns of a table of weights with a sum above 0."""
    table = np.asarray(joint, dtype=np.float64)
    table = table / table.sum()
    return entropy(table.sum(axis=0)) + entropy(table.sum(axis=1)) - entropy(table.ravel())


def permutation_p(shares: Array, labels: Sequence[str], *, seed: int = 0) -> float:
    """Share of random permutations of the labels with at least the information of the labels as they are.

    Args:
        shares: [n, E].
        labels: of each image.
        seed: of the permutations.
    """
    names, rows = np.unique(np.asarray(labels), return_inverse=True)
    generator = np.random.default_rng(seed)

    def information(order: NDArray[np.int64]) -> float:
        joint = np.zeros((len(names), shares.shape[1]))
        np.add.at(joint, order, shares)
        return mutual_information(joint)

    own = information(rows)
    # Rounding makes equal tables differ by less than this.
    above = sum(information(generator.permutation(rows)) >= own - 1e-12 for _ in range(_DRAWS))
    return (1 + above) / (1 + _DRAWS)


def _fixed(values: Array) -> Sums:
    return np.rint(values * _UNIT).astype(np.int64)


def _entropies(rows: Array) -> Array:
    """[n] bits of rows [n, E]."""
    logs = np.log2(rows, out=np.zeros_like(rows), where=rows > 0)
    return -(rows * logs).sum(axis=1)
