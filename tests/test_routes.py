"""Information in routes against a plain sum over the joint distribution, and its baseline against permutations."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.routes import RouteSums, entropy, mutual_information, permutation_p

_SOME_LANGUAGES = ("en", "pt-BR", "zh-Hant", "sw", "\u0395\u03bb", "qaa-x-made-up", "fi")


@st.composite
def routed(draw: st.DrawFn) -> tuple[np.ndarray, list[str]]:
    """Weights of some images and a label of each: dense, top-k, or top-k without renormalising."""
    n, experts = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    weights = generator.dirichlet(np.full(experts, draw(st.sampled_from([0.05, 1.0, 50.0]))), n) + 1e-9
    topk = draw(st.integers(1, experts))
    weights[np.arange(n)[:, None], np.argsort(-weights, axis=1)[:, topk:]] = 0.0
    labels = draw(st.lists(st.sampled_from(_SOME_LANGUAGES), min_size=n, max_size=n))
    return weights, labels


def _plain(weights: np.ndarray, labels: list[str]) -> float:
    joint: dict[tuple[str, int], float] = defaultdict(float)
    for row, label in zip(weights, labels, strict=True):
        for expert, weight in enumerate(row):
            joint[label, expert] += weight / row.sum() / len(labels)
    label_of = {a: sum(p for (b, _), p in joint.items() if b == a) for a, _ in joint}
    expert_of = {e: sum(p for (_, f), p in joint.items() if f == e) for _, e in joint}
    return sum(p * math.log2(p / (label_of[a] * expert_of[e])) for (a, e), p in joint.items() if p > 0)


@settings(max_examples=60, deadline=None)
@given(routed())
def test_information_is_the_mutual_information_of_shares_and_labels(data: tuple[np.ndarray, list[str]]) -> None:
    weights, labels = data
    sums = RouteSums()
    sums.add(weights, {"language": labels})
    found, usage = sums.information("language"), sums.usage()
    assert usage is not None
    shares = weights / weights.sum(axis=1, keepdims=True)
    assert usage.shares == pytest.approx(shares.mean(axis=0), abs=1e-9)
    assert usage.image_entropy == pytest.approx(np.mean([entropy(row) for row in shares]), abs=1e-8)
    if len(set(labels)) < 2:
        assert found is None
        return
    assert found is not None
    assert found.bits == pytest.approx(_plain(weights, labels), abs=1e-7)
    assert found.n == len(labels)
    assert -1e-9 <= found.bits <= min(found.most, usage.entropy) + 1e-7


@settings(max_examples=40, deadline=None)
@given(routed(), st.integers(0, 10_000), st.integers(1, 5))
def test_sums_do_not_depend_on_how_images_are_dealt(data: tuple[np.ndarray, list[str]], seed: int, ranks: int) -> None:
    weights, labels = data
    whole = RouteSums()
    whole.add(weights, {"language": labels, "category": [""] * len(labels)})
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = []
    for rank in range(ranks):
        part = RouteSums()
        for row in order[rank::ranks]:
            part.add(weights[[row]], {"language": [labels[row]]})
        parts.append(part)
    total = RouteSums()
    for part in parts:
        saved = RouteSums()
        saved.load_state_dict(json.loads(json.dumps(part.state_dict())))
        total.merge(saved)
    assert total.information("language") == whole.information("language")
    assert total.usage() == whole.usage()
    assert total.kinds == whole.kinds == ("language",)


@pytest.mark.parametrize(("spread", "topk"), [(50.0, 6), (1.0, 6), (1.0, 1), (1.0, 2)])
@pytest.mark.parametrize("labels", [2, 48])
def test_baseline_is_the_mean_over_permutations(spread: float, topk: int, labels: int) -> None:
    n, experts = 480, 6
    generator = np.random.default_rng(3)
    weights = generator.dirichlet(np.full(experts, spread), n) * np.linspace(1, 3, experts)
    weights[np.arange(n)[:, None], np.argsort(-weights, axis=1)[:, topk:]] = 0.0
    shares = weights / weights.sum(axis=1, keepdims=True)
    names = generator.integers(0, labels, n)
    sums = RouteSums()
    sums.add(weights, {"language": [f"l{name}" for name in names]})
    found = sums.information("language")
    assert found is not None
    drawn = []
    for _ in range(300):
        joint = np.zeros((labels, experts))
        np.add.at(joint, generator.permutation(names), shares)
        drawn.append(mutual_information(joint[joint.sum(axis=1) > 0]))
    # Of second order: with ten images a label the shares of hard routes differ much.
    assert found.by_chance == pytest.approx(np.mean(drawn), rel=0.15 if labels == 48 and topk < 6 else 0.06)


def test_ends_of_the_scale() -> None:
    labels = [language for language in _SOME_LANGUAGES[:6] for _ in range(4)]
    sums, uniform, one = RouteSums(), RouteSums(), RouteSums()
    sums.add(np.eye(6)[[i // 4 for i in range(24)]] * 0.3, {"language": labels})
    uniform.add(np.full((24, 6), 1 / 6), {"language": labels})
    one.add(np.eye(6)[[2] * 24], {"language": labels})
    of_languages, nothing = sums.information("language"), uniform.information("language")
    assert of_languages is not None
    assert nothing is not None
    assert of_languages.bits == pytest.approx(math.log2(6))
    assert nothing.bits == pytest.approx(0.0, abs=1e-9)
    assert nothing.by_chance == pytest.approx(0.0, abs=1e-9)
    use, flat, all_to_one = sums.usage(), uniform.usage(), one.usage()
    assert use is not None
    assert flat is not None
    assert all_to_one is not None
    assert (use.image_entropy, use.entropy, use.dead) == (0.0, pytest.approx(math.log2(6)), ())
    assert flat.image_entropy == pytest.approx(math.log2(6))
    assert (all_to_one.entropy, all_to_one.dead) == (0.0, (1, 2, 4, 5, 6))


def test_p_of_permutations() -> None:
    generator = np.random.default_rng(0)
    labels = ["a", "b", "c"] * 40
    told = np.eye(3)[[0, 1, 2] * 40]
    assert permutation_p(told, labels) == 0.001
    assert permutation_p(generator.dirichlet(np.ones(3), 120), labels) > 0.02
    assert permutation_p(np.full((120, 3), 1 / 3), labels) == 1.0
