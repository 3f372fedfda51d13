"""Intervals and paired tests against enumeration, closed forms, an incomplete beta function and simulated coverage."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.evaluation.statistics import (
    _critical,
    accuracy_interval,
    join_clusters,
    mean_margin,
    paired_test,
    two_way_margin,
)

BOUNDED = settings(max_examples=60, deadline=None)
RIGHT = st.lists(st.integers(0, 1), min_size=2, max_size=40)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 7, 10, 29, 120, 300, 301, 2000])
def test_quantile_of_t_leaves_its_tail(dof: int) -> None:
    t = mpmath.mpf(_critical(dof))
    tails = mpmath.betainc(mpmath.mpf(dof) / 2, mpmath.mpf(1) / 2, 0, dof / (dof + t**2), regularized=True)
    assert float(tails) == pytest.approx(0.05, abs=2e-8)


@BOUNDED
@given(right=RIGHT)
def test_interval_of_independent_answers_is_wilsons(right: list[int]) -> None:
    """Its ends are the accuracies that lie `critical` standard errors from the one seen."""
    n, seen = len(right), sum(right) / len(right)
    interval = accuracy_interval(right, np.arange(n))
    assert interval is not None
    effective = n if seen in (0, 1) else n - 1  # the variance between n answers divides by n - 1
    for end in (each / 100 for each in interval):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / effective)
            assert abs(end - seen) == pytest.approx(_critical(n - 1) * error, rel=1e-6, abs=1e-9)
    assert interval[0] - 1e-9 <= 100 * seen <= interval[1] + 1e-9


@BOUNDED
@given(right=RIGHT, copies=st.integers(2, 6))
def test_copies_of_an_answer_tell_nothing_new(right: list[int], copies: int) -> None:
    """Six languages that always agree are as one, which an interval over rows would not see."""
    once = accuracy_interval(right, np.arange(len(right)))
    repeated = accuracy_interval(right * copies, np.tile(np.arange(len(right)), copies))
    assert repeated == pytest.approx(once)
    strata = np.repeat(np.arange(copies), len(right))
    assert accuracy_interval(right * copies, np.tile(np.arange(len(right)), copies), strata) == pytest.approx(once)
    low, high = accuracy_interval(right * copies, np.arange(len(right) * copies)) or (0, 0)
    assert once is not None
    assert high - low < once[1] - once[0]


@BOUNDED
@given(data=st.data(), right=RIGHT)
def test_interval_does_not_depend_on_the_order(data: st.DataObject, right: list[int]) -> None:
    clusters = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(right), max_size=len(right))))
    order = np.array(data.draw(st.permutations(range(len(right)))))
    values = np.array(right)
    clusters = join_clusters([(c,) for c in clusters.tolist()])
    first = accuracy_interval(values, clusters)
    assert accuracy_interval(values[order], clusters[order]) == pytest.approx(first)
    assert first is not None
    assert 0 <= first[0] <= 100 * values.mean() + 1e-9
    assert 100 * values.mean() - 1e-9 <= first[1] <= 100


def test_interval_where_there_is_little() -> None:
    assert accuracy_interval([], np.array([], dtype=np.int64)) is None
    assert accuracy_interval([1, 0, 1], np.zeros(3, dtype=np.int64)) == (0.0, 100.0)
    # all right: clusters count, not rows
    few, many = accuracy_interval([1] * 60, np.arange(60) // 6), accuracy_interval([1] * 10, np.arange(10))
    assert few == pytest.approx(many)
    assert few is not None
    assert few[1] == 100.0


@pytest.mark.parametrize(
    ("number", "size", "accuracy", "correlation"),
    [(30, 6, 0.25, 0.5), (120, 6, 0.8, 0.5), (40, 4, 0.5, 0.8), (60, 1, 0.8, 0.0)],
)
def test_interval_covers_the_truth(number: int, size: int, accuracy: float, correlation: float) -> None:
    """Beta-binomial clusters of unequal sizes: 95% of intervals hold the truth, and far fewer that ignore clusters."""
    generator, runs, held, ignoring = np.random.default_rng(7), 600, 0, 0
    for _ in range(runs):
        own = np.full(number, accuracy)
        if correlation:
            scale = (1 - correlation) / correlation
            own = generator.beta(accuracy * scale, (1 - accuracy) * scale, number)
        clusters = np.repeat(np.arange(number), generator.integers(1, 2 * size, number))
        right = (generator.random(len(clusters)) < own[clusters]).astype(np.int64)
        for independent in (False, True):
            low, high = accuracy_interval(right, np.arange(len(right)) if independent else clusters) or (0, 0)
            if low <= 100 * accuracy <= high:
                held, ignoring = held + (not independent), ignoring + independent
    assert 0.93 <= held / runs <= 0.985
    assert size == 1 or ignoring / runs < 0.85


def test_margin_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    spread = np.std(values, ddof=1) / 2
    assert mean_margin(values, np.arange(4)) == pytest.approx(_critical(3) * spread)
    assert mean_margin(values * 3, np.tile(np.arange(4), 3)) == pytest.approx(_critical(3) * spread)
    assert mean_margin([1.0, 5.0], np.array([0, 0])) == math.inf


@BOUNDED
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=60))
def test_paired_test_of_independent_answers_is_mcnemars(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    result = paired_test(first, second, np.arange(len(pairs)))
    only = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    assert (result.first_only, result.second_only, result.n) == (*only, len(pairs))
    discordant = sum(only)
    tail = sum(math.comb(discordant, k) for k in range(min(only) + 1)) / 2**discordant
    assert result.discordant == discordant
    assert result.p == pytest.approx(min(1.0, 2 * tail))


@BOUNDED
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 8)), min_size=1, max_size=24),
)
def test_paired_test_of_clusters_is_the_enumeration_of_exchanges(rows: list[tuple[int, int, int]]) -> None:
    clusters = join_clusters([(c,) for *_, c in rows])
    result = paired_test([a for a, *_ in rows], [b for _, b, _ in rows], clusters)
    sums = np.bincount(clusters, [a - b for a, b, _ in rows])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    assert result.p == pytest.approx(float((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).mean()))
    swapped = paired_test([b for _, b, _ in rows], [a for a, *_ in rows], clusters)
    assert swapped.p == pytest.approx(result.p)
    assert (swapped.first_only, swapped.difference) == (result.second_only, pytest.approx(-result.difference))


def test_paired_test_of_copies_is_that_of_one() -> None:
    """Six languages that agree are no evidence beyond one of them."""
    first, second = np.array([1, 1, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 0, 0])
    once = paired_test(first, second, np.arange(6))
    copies = paired_test(np.tile(first, 6), np.tile(second, 6), np.tile(np.arange(6), 6))
    assert once.p == copies.p == pytest.approx(2 / 16)
    assert copies.discordant == 6 * once.discordant
    assert paired_test(np.tile(first, 6), np.tile(second, 6), np.arange(36)).p < 1e-5


def test_paired_test_that_is_too_long_to_enumerate(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    first, second = generator.integers(0, 30, 40), generator.integers(0, 34, 40)
    exact = paired_test(first, second, np.arange(40))
    monkeypatch.setattr("parrot_sys.evaluation.statistics._LARGEST_EXACT", 10)
    drawn = paired_test(first, second, np.arange(40))
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p / 20_000))
    assert paired_test([], [], np.array([], dtype=np.int64)).p == 1.0


@BOUNDED
@given(keys=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), max_size=12))
def test_clusters_are_connected_components(keys: list[list[int]]) -> None:
    numbers = join_clusters(keys)
    reached = [{row} for row in range(len(keys))]
    for _ in keys:
        reached = [
            {other for row in own for other in range(len(keys)) if set(keys[row]) & set(keys[other])} for own in reached
        ]
    for row, own in enumerate(reached):
        assert {other for other in range(len(keys)) if numbers[other] == numbers[row]} == own
    assert sorted(set(numbers.tolist())) == list(range(len(set(numbers.tolist()))))


@BOUNDED
@given(st.lists(st.integers(-1, 1), min_size=3, max_size=12), st.integers(2, 4))
def test_runs_that_agree_leave_the_interval_of_the_clusters(values: list[int], runs: int) -> None:
    number = len(values)
    clusters, seeds = np.tile(np.arange(number), runs), np.repeat(np.arange(runs), number)
    margin = two_way_margin(values * runs, clusters, seeds)
    assert margin == pytest.approx(mean_margin(values, np.arange(number)))
    moved = two_way_margin([value + 7 for value in values * runs], clusters, seeds)
    assert moved == pytest.approx(margin)
    assert two_way_margin(values, np.arange(number), np.zeros(number, dtype=np.int64)) == pytest.approx(margin)


def test_interval_by_clusters_and_runs_covers_the_truth() -> None:
    """Differences that vary over pictures and over three seeds: pictures alone would be sure of too much."""
    generator, repeats, held, ignoring = np.random.default_rng(3), 800, 0, 0
    pictures, seeds = 40, 3
    clusters, runs = np.tile(np.arange(pictures), seeds), np.repeat(np.arange(seeds), pictures)
    for _ in range(repeats):
        values = generator.normal(0, 1, pictures)[clusters] + generator.normal(0, 0.3, seeds)[runs]
        values = values + generator.normal(0, 1, len(values))
        held += abs(values.mean()) <= two_way_margin(values, clusters, runs)
        ignoring += abs(values.mean()) <= mean_margin(values, clusters)
    assert 0.93 <= held / repeats <= 0.995
    assert ignoring / repeats < 0.9
