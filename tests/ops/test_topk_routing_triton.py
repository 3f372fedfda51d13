"""topk_routing in Triton beyond what it shares with the other back ends: the three-launch path and ragged shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_kernels.launches import planned
from parrot_kernels.topk_routing import reference, triton_impl
from parrot_sys.ops import force_backend, topk_routing

FLOATS = 5  # the first outputs; the others are integers


def assert_same_route(logits: torch.Tensor, topk: int, *options: object) -> None:
    """Integers as the reference's, floats to rounding."""
    actual = triton_impl.topk_routing_fwd(logits, topk, *options)
    wanted = reference.topk_routing_fwd(logits, topk, *options)
    for own, other in zip(actual[FLOATS:], wanted[FLOATS:], strict=True):
        assert torch.equal(own, other)
    for own, other in zip(actual[:FLOATS], wanted[:FLOATS], strict=True):
        torch.testing.assert_close(own, other)


def test_many_rows_take_three_launches(
    watch_launches, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    """More rows than one program takes: several programs with several tiles each, the last one short."""
    launched = watch_launches(triton_impl)
    monkeypatch.setattr(triton_impl, "_TILE", 32)
    monkeypatch.setattr(triton_impl, "_ONE_PROGRAM", 64)
    # Plans of these limits are this test's own.
    monkeypatch.setattr(triton_impl, "_fwd_plan", planned(triton_impl._fwd_plan.__wrapped__))
    assert_same_route(torch.randn(131, 6, device=triton_device), 2, True)
    assert launched == ["fwd_kernel", "totals_kernel", "plan_kernel"]
    bias = torch.randn(12, device=triton_device)
    assert_same_route(torch.randn(45, 12, device=triton_device), 3, True, "sigmoid", 2.5, 3, 2, bias)
    assert_same_route(torch.zeros(40, 5, device=triton_device), 1, False)  # all to one expert
    launched.clear()
    assert_same_route(torch.randn(8, 6, device=triton_device), 2, True)
    assert launched == ["fwd_kernel"]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ragged_shapes(triton_device: torch.device, data: st.DataObject) -> None:
    """Any rows, experts, groups and ties; the reference gives the integers."""
    num_groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    topk_groups = data.draw(st.integers(1, num_groups))
    topk = data.draw(st.integers(1, min(16, topk_groups * size)))
    rows = data.draw(st.integers(0, 40))
    score_function = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(-4, 4, (rows, num_groups * size), generator=generator).float().to(triton_device)
    # Sums of few distinct halves and quarters are exact, so that equal groups are equal in every back end.
    bias = data.draw(st.sampled_from([None, torch.zeros(num_groups * size, device=triton_device)]))
    if num_groups > 1 and (score_function == "sigmoid" or bias is not None or topk // topk_groups > 1):
        logits = logits + torch.arange(num_groups * size, device=triton_device) / 64  # scores round: no ties then
    assert_same_route(logits, topk, True, score_function, 1.5, num_groups, topk_groups, bias)


def test_refuses_what_it_cannot_hold() -> None:
    assert "columns" in str(triton_impl.why_not(torch.zeros(2, 2000), 2, True))
    assert "columns" in str(triton_impl.why_not(torch.zeros(2, 660), 2, True, "softmax", 1.0, 33, 3))
    assert "float64" in str(triton_impl.why_not(torch.zeros(2, 6, dtype=torch.float64), 2, True))
    with force_backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        topk_routing(torch.zeros(2, 6, dtype=torch.float64), 2, renormalize=True)
