"""permute and unpermute: values and gradients against indexing in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.testing import assert_accurate, assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import permute, topk_routing, unpermute

BACKENDS = ["reference", "cpu", "triton"]
# rows, width, K, places that are dropped
CASES = {
    "plain": (9, 16, 2, 0),
    "primes": (7, 13, 3, 0),
    "one_row": (1, 5, 1, 0),
    "wide": (3, 150, 2, 0),  # several blocks of columns in the interpreter
    "dropped": (8, 16, 3, 5),  # some rows lose choices
    "all_dropped": (4, 8, 2, 8),
    "no_row": (0, 8, 2, 0),
}


def make_plan(rows: int, topk: int, dropped: int) -> Tensor:
    return torch.randperm(rows * topk)[: rows * topk - dropped]


def runs(backend: str, dtype: torch.dtype, case: str) -> bool:
    if backend == "triton":  # the interpreter is slow
        return dtype == torch.bfloat16 or case == "plain"
    return backend != "cpu" or dtype != torch.float16  # (auto takes the reference there)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUNS = [
    pytest.param(backend, dtype, case, id=f"{backend}-{name}-{case}")
    for backend in BACKENDS
    for name, dtype in DTYPES.items()
    for case in CASES
    if runs(backend, dtype, case)
]


@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
def test_permute_matches_float64(ran_on, triton_device, case: str, backend: str, dtype: torch.dtype) -> None:
    rows, width, topk, dropped = CASES[case]
    device = triton_device if backend == "triton" else "cpu"
    plan = make_plan(rows, topk, dropped).to(device)
    inputs = {"x": torch.randn(rows, width).to(device), "probs": torch.rand(rows, topk).to(device)}

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        moved, probs = permute(leaves["x"], plan, topk=topk, probs=leaves["probs"].to(torch.float32))
        assert probs is not None
        return {"rows": moved, "row_probs": probs}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        probs = leaves["probs"].to(torch.promote_types(leaves["probs"].dtype, torch.float32))
        return {"rows": leaves["x"][plan // topk], "row_probs": probs.flatten()[plan]}

    with ran_on(backend, "permute", "permute_fwd", "permute_bwd"):
        actual = outputs_and_gradients(op, inputs, dtype)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert torch.equal(actual["rows"], exact["rows"].to(dtype))
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain_sum"])
def test_unpermute_matches_float64(
    ran_on, triton_device, case: str, weighted: bool, backend: str, dtype: torch.dtype
) -> None:
    rows, width, topk, dropped = CASES[case]
    device = triton_device if backend == "triton" else "cpu"
    plan = make_plan(rows, topk, dropped).to(device)
    inputs = {"rows": torch.randn(len(plan), width).to(device), "probs": torch.rand(rows, topk).to(device)}
    if not weighted:
        inputs.pop("probs")

    def probs_of(leaves: dict[str, Tensor], dtype: torch.dtype) -> Tensor | None:
        return leaves["probs"].to(torch.promote_types(dtype, torch.float32)) if weighted else None

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": unpermute(leaves["rows"], plan, topk=topk, num_rows=rows, probs=probs_of(leaves, dtype))}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        own = leaves["rows"]
        if weighted:
            own = own * leaves["probs"].flatten()[plan, None]
        return {"y": own.new_zeros(rows, width).index_add(0, plan // topk, own)}

    with ran_on(backend, "permute", "unpermute_fwd", "unpermute_bwd"):
        actual = outputs_and_gradients(op, inputs, dtype)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip_with_the_plan_of_the_router(ran_on, triton_device, backend: str) -> None:
    """Rows sorted by expert, and back: with probabilities that sum to one the rows are as before."""
    device = triton_device if backend == "triton" else "cpu"
    with ran_on("reference", "topk_routing", "topk_routing_fwd"):
        route = topk_routing(torch.randn(11, 6, device=device), 3, renormalize=True)
    x = torch.randn(11, 2, 4, device=device)
    with ran_on(backend, "permute", "permute_fwd", "unpermute_fwd"):
        rows, _ = permute(x, route.plan, topk=3)
        back = unpermute(rows, route.plan, topk=3, num_rows=11, probs=route.probs.gather(1, route.topk_indices))
    assert rows.shape == (33, 2, 4)
    experts = route.topk_indices.flatten()[route.plan]
    assert torch.equal(experts, experts.sort().values)
    torch.testing.assert_close(back, x)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 12), width=st.integers(1, 150), topk=st.integers(1, 4), dropped=st.integers(0, 48))
def test_ragged_plans_on_triton(ran_on, triton_device, rows: int, width: int, topk: int, dropped: int) -> None:
    """Copies are exact, and sums of bfloat16 rows are rounded once."""
    plan = make_plan(rows, topk, min(dropped, rows * topk))
    x, probs = torch.randn(rows, width).bfloat16(), torch.rand(rows, topk)
    on = [tensor.to(triton_device) for tensor in (x, plan, probs)]
    with ran_on("triton", "permute", "permute_fwd", "unpermute_fwd"):
        moved, row_probs = permute(on[0], on[1], topk=topk, probs=on[2])
        y = unpermute(moved, on[1], topk=topk, num_rows=rows, probs=on[2])
    assert row_probs is not None
    assert torch.equal(moved.cpu(), x[plan // topk])
    assert torch.equal(row_probs.cpu(), probs.flatten()[plan])
    parts = x[plan // topk].double() * probs.flatten()[plan, None]
    exact = torch.zeros(rows, width, dtype=torch.float64).index_add(0, plan // topk, parts)
    assert_accurate("y", y.cpu(), exact, exact.bfloat16())


def test_gradcheck() -> None:
    plan = make_plan(4, 2, 1)
    x, probs = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)

    def function(x: Tensor, probs: Tensor) -> Tensor:
        rows, row_probs = permute(x, plan, topk=2, probs=probs)
        assert row_probs is not None
        return unpermute(rows * row_probs[:, None], plan, topk=2, num_rows=4, probs=probs)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), probs.requires_grad_()))


def test_wrong_arguments_are_named() -> None:
    x, plan = torch.zeros(3, 2), torch.arange(6)
    with pytest.raises(ValueError, match=r"probs must be \[num_rows=3, topk=2\], got \[3, 1\]"):
        permute(x, plan, topk=2, probs=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"one row for each of the plan's 6 places, got 5"):
        unpermute(torch.zeros(5, 2), plan, topk=2, num_rows=3)
    with pytest.raises(RuntimeError, match=r"plan entries must lie in \[0, 6\), got 6 at place 0"):
        unpermute(torch.zeros(1, 2), torch.tensor([6]), topk=2, num_rows=3)
    with pytest.raises(RuntimeError, match=r"plan entries must differ, got 4 twice"):
        unpermute(torch.zeros(2, 2), torch.tensor([4, 4]), topk=2, num_rows=3)
