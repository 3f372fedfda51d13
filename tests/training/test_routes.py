"""Warnings about routes: healthy ones give none, each failure gives one, and a restart does not change when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from numpy.typing import NDArray

from parrot_sys.markdown_tables import fixed
from parrot_sys.routes import RouteSums
from parrot_sys.training.routes import RouteWatch, route_record
from parrot_sys.training.trackers.facts import routing_image

Array = NDArray[np.float64]

_ROUTES = {
    "healthy": np.eye(4)[[0, 1, 2, 3] * 16],
    "uniform": np.full((64, 4), 0.25),
    "one": np.eye(4)[[2] * 64],
    "none": np.empty((0, 4)),
}

# A languages, E experts


def _sums(weights: Array, languages: Sequence[str]) -> RouteSums:
    sums = RouteSums()
    sums.add(weights, {"language": languages})
    return sums


def _record(kind: str) -> RouteSums:
    return _sums(_ROUTES[kind], (["en", "sw", "pt-BR", "en"] * 16)[: len(_ROUTES[kind])])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["healthy", "uniform", "one"]), min_size=1, max_size=8),
    st.integers(0, 80),
)
def test_a_problem_is_said_once_and_again_after_recovery(windows: list[str], restart: int) -> None:
    kinds = [kind for kind in windows for _ in range(10)]
    watch, said = RouteWatch(), []
    for number, kind in enumerate(kinds):
        if number == restart:
            saved = watch.state_dict()
            watch = RouteWatch()
            watch.load_state_dict(saved)
        assert watch.judge(_record("none")) == []  # steps of text alone neither count nor interrupt
        said += [(number, text) for text in watch.judge(_record(kind))]

    due = [i for i, kind in enumerate(windows) if kind != "healthy" and kind != ["", *windows][i]]
    assert [number for number, _ in said] == [10 * i + 9 for i in due]
    for number, text in said:
        expected = {
            "uniform": "routes are uniform (entropy of an image's weights: 2.0000 of 2.0000 bits): experts act as one, "
            "I(expert; language) is 0.0000 bits",
            "one": "expert 3 of 4 takes 100% of all images (mean over languages), I(expert; language) is 0.0000 bits",
        }
        assert text.startswith(expected[kinds[number]])
        assert "so it was over the last 10 records" in text


@dataclass(frozen=True)
class Run:
    """Records of a run: weights and languages of the images of each."""

    experts: int
    languages: int
    topk: int
    images: int  # of a record
    skew: float  # 1: languages alike; above, each has so many times the images of the next
    seed: int

    def warnings(self, logits: Callable[[np.random.Generator, NDArray[np.int64]], Array], records: int) -> list[str]:
        """What is said in a run whose router gives [n, E] logits to the languages [n] of images."""
        generator, watch, said = np.random.default_rng(self.seed), RouteWatch(), []
        often = self.skew ** -np.arange(self.languages)
        for _ in range(records):
            languages = generator.choice(self.languages, self.images, p=often / often.sum())
            weights = np.exp(logits(generator, languages))
            weights[np.arange(len(weights))[:, None], np.argsort(-weights, axis=1)[:, self.topk :]] = 0.0
            said += watch.judge(_sums(weights, [f"l{language}" for language in languages]))
        return said


@st.composite
def runs(draw: st.DrawFn, least_experts: int = 2) -> Run:
    experts = draw(st.integers(least_experts, 16))
    return Run(
        experts=experts,
        languages=draw(st.integers(2, 12)),
        topk=draw(st.integers(1, experts // 2) | st.just(experts)),
        images=draw(st.sampled_from([1, 2, 7, 64, 256])),
        skew=draw(st.sampled_from([1.0, 1.2, 1.5])),
        seed=draw(st.integers(0, 10_000)),
    )


def _records(run: Run) -> int:
    """Enough to judge what experts do several times."""
    return max(45, 60 * run.experts // run.images)


@settings(max_examples=150, deadline=None)
@given(runs(), st.sampled_from([2.0, 4.0, 8.0]))
def test_healthy_routes_do_not_warn(run: Run, sharpness: float) -> None:
    """Each language has experts of its own, or shares one with others; which of them an image has is by chance."""
    own = np.arange(run.experts)[None] % run.languages == np.arange(run.languages)[:, None]
    own |= np.arange(run.experts)[None] == np.arange(run.languages)[:, None] % run.experts

    def logits(generator: np.random.Generator, languages: NDArray[np.int64]) -> Array:
        return sharpness * own[languages] + generator.normal(size=(len(languages), run.experts))

    assert run.warnings(logits, _records(run)) == []


def test_data_nearly_all_in_one_language_do_not_warn() -> None:
    generator, watch = np.random.default_rng(0), RouteWatch()
    for _ in range(60):
        languages = np.where(generator.random(256) < 0.97, 0, generator.integers(0, 6, 256))
        assert watch.judge(_sums(np.eye(6)[languages], [f"l{language}" for language in languages])) == []


@pytest.mark.parametrize("language", ["en", ""])
def test_images_of_one_language_may_have_one_route(language: str) -> None:
    watch = RouteWatch()
    said = [text for _ in range(20) for text in watch.judge(_sums(np.eye(6)[[2] * 64], [language] * 64))]
    assert [text[:17] for text in said] == ([] if language else ["expert 3 of 6 tak"])


@settings(max_examples=30, deadline=None)
@given(runs(), st.integers(0, 10_000))
def test_an_expert_that_takes_all_is_named(run: Run, seed: int) -> None:
    chosen = seed % run.experts

    def logits(generator: np.random.Generator, languages: NDArray[np.int64]) -> Array:
        return 12.0 * np.eye(run.experts)[[chosen] * len(languages)] + generator.normal(size=(len(languages), 1))

    (text,) = run.warnings(logits, _records(run))
    assert text.startswith(f"expert {chosen + 1} of {run.experts} takes 100% of all images")


@settings(max_examples=30, deadline=None)
@given(runs(least_experts=4))
def test_the_same_routes_for_all_images_warn(run: Run) -> None:
    """Two experts with 51% and 49%, and the others dead or nearly so: top-k and dense alike."""

    def logits(generator: np.random.Generator, languages: NDArray[np.int64]) -> Array:
        row = np.full(run.experts, -9.0)
        row[:2] = np.log([0.51, 0.49])
        return np.tile(row, (len(languages), 1))

    (text,) = run.warnings(logits, _records(run))
    if run.topk > 1:
        assert text.startswith("routes are the same for all images (H(expert) "), text
    else:
        assert text.startswith("expert 1 of")


@settings(max_examples=30, deadline=None)
@given(runs(least_experts=5), st.booleans())
def test_most_experts_dead_warn(run: Run, by_language: bool) -> None:
    """Two experts are used, in every language or each in its own, with weights that differ from image to image."""

    def logits(generator: np.random.Generator, languages: NDArray[np.int64]) -> Array:
        values = generator.normal(size=(len(languages), run.experts))
        values[:, 2:] -= 20.0
        if by_language:
            values[:, 0] += np.where(languages % 2, 4.0, -4.0)
        return values

    first, *others = run.warnings(logits, _records(run))
    assert first.startswith(f"{run.experts - 2} of {run.experts} experts are dead (mean over languages)")
    assert all(text.startswith("routes say nothing of the language") for text in others)
    assert not by_language or others == []


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.data(), st.booleans(), st.integers(0, 10_000))
def test_routes_that_say_nothing_of_the_language_warn(
    experts: int, languages: int, data: st.DataObject, equal: bool, seed: int
) -> None:
    """Experts chosen at random, with random or equal weights: an image's own entropy is then log2 of topk."""
    topk = data.draw(st.integers(1, experts - 1))
    run = Run(experts=experts, languages=languages, topk=topk, images=512, skew=1.0, seed=seed)

    def logits(generator: np.random.Generator, languages: NDArray[np.int64]) -> Array:
        values = generator.normal(size=(len(languages), experts))
        return 1e-3 * values if equal else values

    said = run.warnings(logits, 100)
    assert len(said) == 1, said
    assert said[0].startswith("routes say nothing of the language (H(expert)")


def test_an_expert_that_changes_with_every_record_is_no_expert_that_takes_all() -> None:
    watch = RouteWatch()
    said = [watch.judge(_sums(np.eye(6)[[number % 6] * 2], ["en", "sw"])) for number in range(12)]
    assert not any(said)


def test_data_sorted_by_language_do_not_warn() -> None:
    watch = RouteWatch()
    for language in range(6):
        for _ in range(40):
            assert watch.judge(_sums(np.eye(6)[[language] * 64], [f"l{language}"] * 64)) == []


@pytest.mark.parametrize(("records", "warns"), [(9, 1), (10, 0), (30, 0)])
def test_checkpoints_of_earlier_versions_say_what_was_said(records: int, warns: int) -> None:
    watch = RouteWatch()
    watch.load_state_dict({"problem": "one", "records": records})
    assert sum(len(watch.judge(_record("one"))) for _ in range(30)) == warns


def test_numbers_of_a_record() -> None:
    record = route_record(_record("healthy"))
    assert record["routes/language_bits"] == pytest.approx(1.5)
    assert record["routes/entropy_bits"] == 2.0
    assert record["routes/image_entropy_bits"] == 0.0
    assert record["routes/shares"] == [0.25] * 4
    assert record["routes/dead_experts"] == 0
    assert "routes/category_bits" not in record
    assert route_record(_record("one"))["routes/dead_experts"] == 3
    assert route_record(_record("none")) == {}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=64), st.booleans())
def test_the_heat_map_names_entropy_and_dead_experts(chosen: list[int], has_routes: bool) -> None:
    languages = ["en" if expert % 2 else "sw" for expert in chosen]
    sums = _sums(np.eye(6)[chosen], languages)
    weights = {f"experts/{name}/probability": row.tolist() for name, row in sums.means("language").items()}
    titles = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Axes, "set_title", lambda ax, text, **_: titles.append(text))
        image = routing_image("validation", 8, weights | (route_record(sums) if has_routes else {}))

    shares = np.bincount(chosen, minlength=6) / len(chosen)
    bits = -sum(share * np.log2(share) for share in shares if share)
    dead = ", ".join(str(expert + 1) for expert in range(6) if shares[expert] < 0.1 / 6) or "none"
    wanted = f"H(expert) {fixed(bits, 2)} of 2.58 bits; dead experts: {dead}"
    assert titles == ["validation: mean routing weight, step 8" + (f"\n{wanted}" if has_routes else "")]
    assert image is not None
    assert (wanted in image.caption) == has_routes
