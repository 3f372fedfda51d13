"""`first_fit_decreasing` of C++ and of Python against a plain quadratic version."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_kernels import _host, host, host_reference

BOTH = pytest.mark.parametrize(
    "first_fit_decreasing", [_host.first_fit_decreasing, host_reference.first_fit_decreasing], ids=["c++", "python"]
)


Packer = Callable[[Any, int], list[list[int]]]


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


@BOTH
@given(lengths=st.lists(st.integers(0, 50), max_size=60), capacity=st.integers(50, 120))
def test_equals_the_quadratic_version(first_fit_decreasing: Packer, lengths: list[int], capacity: int) -> None:
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity) == quadratic(lengths, capacity)


@BOTH
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
def test_small_cases(first_fit_decreasing: Packer, lengths: list[int], bins: list[list[int]]) -> None:
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), 8) == bins


@BOTH
@pytest.mark.parametrize("wrong", [9, -1])
def test_a_length_that_does_not_fit_is_named(first_fit_decreasing: Packer, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"lengths\[1\] must be in \[0, capacity=8\], got {wrong}"):
        first_fit_decreasing(np.array([8, wrong, 3], dtype=np.int64), 8)


@BOTH
def test_other_dtypes_and_dimensions_are_refused(first_fit_decreasing: Packer) -> None:
    with pytest.raises(TypeError):
        first_fit_decreasing(np.array([1.5, 2.0]), 8)
    with pytest.raises(ValueError, match="1 dimension, got 2"):
        first_fit_decreasing(np.zeros((2, 2), dtype=np.int64), 8)


@BOTH
def test_strided_arrays_are_read_rightly(first_fit_decreasing: Packer) -> None:
    assert first_fit_decreasing(np.array([5, 99, 6, 99, 2], dtype=np.int64)[::2], 8) == [[1, 2], [0]]


@BOTH
def test_time_grows_almost_linearly(first_fit_decreasing: Packer) -> None:
    lengths = np.random.default_rng(0).integers(400, 600, 200_000)
    start = time.perf_counter()
    bins = first_fit_decreasing(lengths, 1000)
    # The quadratic version scans 10^5 bins for each of 2 * 10^5 samples: minutes.
    assert time.perf_counter() - start < 5
    assert sorted(i for items in bins for i in items) == list(range(200_000))
    assert max(lengths[items].sum() for items in bins) <= 1000


def test_the_compiled_one_is_used_where_it_was_built() -> None:
    assert host.first_fit_decreasing is _host.first_fit_decreasing
    assert host.why_not() is None
