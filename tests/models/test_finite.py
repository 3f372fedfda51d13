"""Values that are no numbers are counted, whatever the dtype and wherever they stand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import CheckpointError
from parrot_sys.models import finite
from parrot_sys.models.finite import NonFinite


@given(
    size=st.integers(0, 40),
    places=st.sets(st.integers(0, 39)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_counts(size: int, places: set[int], bad: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(size, 1).to(dtype)
    places = {place for place in places if place < size}
    tensor[sorted(places)] = bad
    found = NonFinite()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finite, "_CHUNK", 7)
        found.look("a", torch.ones(3))
        found.look("b", tensor)
        found.look("ids", torch.arange(3))
    assert found.counts == ({"b": len(places)} if places else {})


def test_messages(caplog: pytest.LogCaptureFixture) -> None:
    found = NonFinite()
    found.refuse("here")
    for number in range(12):
        found.look(f"t{number:02}", torch.tensor([math.nan] * (number + 1)))
    with pytest.raises(CheckpointError, match=r"infinite weights in 12 tensors: t00 \(1\), .*and 2 more"):
        found.refuse("here")
    found.refuse("here", allow=True)
    assert "here holds NaN or infinite weights in 12 tensors" in caplog.text
    found.merge([{"t00": 5}, {"other": 1}])
    assert (found.counts["t00"], found.counts["other"]) == (5, 1)
