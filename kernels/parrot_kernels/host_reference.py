"""Helpers of `_host` (csrc/host) in Python: the same results and errors, without a compiler."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def first_fit_decreasing(lengths: npt.ArrayLike, capacity: int) -> list[list[int]]:
    """Packs samples into bins of at most `capacity` rows: first-fit decreasing, O(n log n), deterministic.

    Args:
        lengths: int64 array [n] of lengths in [0, capacity].
        capacity: rows that a bin can hold.

    Returns:
        For every bin the indices of its samples, longest first; equal lengths by rising index.

    Raises:
        TypeError: the lengths are no integers.
        ValueError: they have not one dimension, or one is negative or exceeds the capacity.
    """
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths must have 1 dimension, got {array.ndim}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {array.dtype}")
    if (wrong := np.flatnonzero((array < 0) | (array > capacity))).size:
        at = int(wrong[0])
        raise ValueError(f"lengths[{at}] must be in [0, capacity={capacity}], got {array[at]}")
    # Room left in each bin at the leaves, the largest room below it at every inner node.
    leaves = 1 << max(len(array) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for index in np.argsort(-array.astype(np.int64), kind="stable").tolist():
        length, node = int(array[index]), 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        room[node] -= length
        number = node - leaves
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
