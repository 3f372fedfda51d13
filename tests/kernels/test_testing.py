"""The test tools themselves: a tolerance rule that fails when it should, and memory that is really poisoned."""

from __future__ import annotations

import pytest
import torch

from parrot_kernels.testing import assert_accurate, make_spans, max_error, poisoned_memory


def test_poisoned_memory_is_nan_inside_only() -> None:
    with poisoned_memory():
        for tensor in (torch.empty(3), torch.empty_like(torch.zeros(3)), torch.zeros(3).new_empty(2)):
            assert tensor.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rule_accepts_the_error_of_pytorch_and_rejects_more() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert_accurate("x", (exact + 7 * eps).float(), exact, exact.float())
    with pytest.raises(AssertionError, match=r"x: error .* exceeds"):
        assert_accurate("x", (exact + 12 * eps).float(), exact, exact.float())
    assert_accurate("x", (exact + 0.1).float(), exact, (exact + 0.06).float())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_non_finite_values_are_errors(wrong: float) -> None:
    assert max_error(torch.tensor([wrong]), torch.tensor([1.0], dtype=torch.float64)) == float("inf")


def test_equal_infinities_are_no_error() -> None:
    minus = torch.tensor([float("-inf")])
    assert max_error(minus, minus.double()) == 0.0


def test_shape_mismatch() -> None:
    with pytest.raises(AssertionError, match=r"shape must be \[2\], got \[1, 2\]"):
        max_error(torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64))


def test_make_spans() -> None:
    start, end = make_spans([3, 0, 2], [1, 2, 1])
    assert start.tolist() == [0, 3, 3, 3]
    assert end.tolist() == [3, 3, 3, 5]
