"""parrot_kernels._host.first_fit_decreasing against a plain quadratic version."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_kernels._host import first_fit_decreasing


def quadratic(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for items in bins:
            if sum(lengths[i] for i in items) + lengths[index] <= capacity:
                items.append(index)
                break
        else:
            bins.append([index])
    return bins


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(50, 120))
def test_equals_the_quadratic_version(lengths: list[int], capacity: int) -> None:
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity) == quadratic(lengths, capacity)


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([5], [[0]]),
        ([8, 8], [[0], [1]]),
        ([4, 4, 4, 4], [[0, 1], [2, 3]]),  # ties by index
        ([0, 0, 0], [[0, 1, 2]]),
        ([3, 5, 3, 5], [[1, 0], [3, 2]]),
    ],
)
def test_small_cases(lengths: list[int], bins: list[list[int]]) -> None:
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), 8) == bins


@pytest.mark.parametrize("wrong", [9, -1])
def test_a_length_that_does_not_fit_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"lengths\[1\] must be in \[0, capacity=8\], got {wrong}"):
        first_fit_decreasing(np.array([8, wrong, 3], dtype=np.int64), 8)


def test_other_dtypes_and_dimensions_are_refused() -> None:
    with pytest.raises(TypeError):
        first_fit_decreasing(np.array([1.5, 2.0]), 8)
    with pytest.raises(ValueError, match="1 dimension, got 2"):
        first_fit_decreasing(np.zeros((2, 2), dtype=np.int64), 8)


def test_strided_arrays_are_read_rightly() -> None:
    assert first_fit_decreasing(np.array([5, 99, 6, 99, 2], dtype=np.int64)[::2], 8) == [[1, 2], [0]]


def test_time_grows_almost_linearly() -> None:
    lengths = np.random.default_rng(0).integers(400, 600, 200_000)
    start = time.perf_counter()
    bins = first_fit_decreasing(lengths, 1000)
    # The quadratic version scans 10^5 bins for each of 2 * 10^5 samples: minutes.
    assert time.perf_counter() - start < 5
    assert sorted(i for items in bins for i in items) == list(range(200_000))
    assert max(lengths[items].sum() for items in bins) <= 1000
