"""Warnings about routes: when they are due, and that a restart does not change when."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.routes import RouteSums
from parrot_sys.training.routes import RouteWatch, route_record

_ROUTES = {
    "healthy": np.eye(4)[[0, 1, 2, 3]],
    "uniform": np.full((4, 4), 0.25),
    "one": np.eye(4)[[2, 2, 2, 2]],
    "none": np.empty((0, 4)),
}


def _record(kind: str) -> dict:
    sums = RouteSums()
    sums.add(_ROUTES[kind], {"language": ["en", "sw", "pt-BR", "en"][: len(_ROUTES[kind])]})
    return route_record(sums)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["healthy", "uniform", "one"]), st.integers(1, 15)), min_size=1, max_size=6),
    st.integers(0, 60),
)
def test_each_tenth_bad_record_in_a_row_warns_once(runs: list[tuple[str, int]], restart: int) -> None:
    kinds = [kind for kind, count in runs for _ in range(count)]
    watch, said = RouteWatch(), []
    for number, kind in enumerate(kinds):
        if number == restart:
            saved = watch.state_dict()
            watch = RouteWatch()
            watch.load_state_dict(saved)
        assert watch.judge(_record("none")) == ""  # steps of text alone neither count nor interrupt
        if text := watch.judge(_record(kind)):
            said.append((number, text))

    def begins(number: int) -> bool:
        """Whether the tenth record in a row of one kind, and no earlier one, is this."""
        run = kinds[: number + 1][::-1]
        length = next((i for i, kind in enumerate(run) if kind != run[0]), len(run))
        return run[0] != "healthy" and length == 10

    assert [number for number, _ in said] == [number for number in range(len(kinds)) if begins(number)]
    for number, text in said:
        expected = {
            "uniform": "routes are uniform (entropy of an image's weights: 2.0000 of 2.0000 bits): experts act as one, "
            "I(expert; language) is 0.0000 bits",
            "one": "expert 3 of 4 takes 100% of all images, I(expert; language) is 0.0000 bits",
        }
        assert text.startswith(expected[kinds[number]])


def test_numbers_of_a_record() -> None:
    record = _record("healthy")
    assert record["routes/language_bits"] == pytest.approx(1.5)
    assert record["routes/entropy_bits"] == 2.0
    assert record["routes/image_entropy_bits"] == 0.0
    assert record["routes/shares"] == [0.25] * 4
    assert record["routes/dead_experts"] == 0
    assert "routes/category_bits" not in record
    assert _record("one")["routes/dead_experts"] == 3
    assert _record("none") == {}
