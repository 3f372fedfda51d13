"""Grouped products: values and gradients against a loop over the groups in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.grouped_gemm import reference, triton_impl
from parrot_kernels.testing import (
    MoEShape,
    assert_accurate,
    assert_all_accurate,
    make_expert_inputs,
    outputs_and_gradients,
)
from parrot_sys.ops import (
    expert_mlp,
    k_grouped_gemm,
    m_grouped_gemm,
    m_grouped_swiglu,
    permute,
    topk_routing,
    unpermute,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ragged:
    """Segments in each group, segments past the last group, rows of a segment, widths."""

    counts: tuple[int, ...]
    padding: int = 0
    rows: int = 1
    k: int = 24  # a multiple of 8: by TMA, where there is TMA
    n: int = 40
    offsets_dtype: torch.dtype = torch.int32

    @property
    def segments(self) -> int:
        return sum(self.counts) + self.padding

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.counts]).cumsum(0).to(self.offsets_dtype)


CASES = {
    "tokens": Ragged((5, 0, 37, 1), padding=2),  # a group of several tiles, an empty one, one row
    "images": Ragged((2, 0, 1), rows=19),  # tiles that begin within an image
    "primes": Ragged((3, 4), k=13, n=11, offsets_dtype=torch.int64),  # by pointers: no aligned rows
    "all_to_one": Ragged((0, 7, 0, 0), padding=1, offsets_dtype=torch.int64),
    "one_row": Ragged((1,), k=1, n=1),
    "empty": Ragged((0, 0), padding=3),
    "no_row": Ragged((0, 0)),
}


def runs(backend: str, dtype: torch.dtype, case: str) -> bool:
    if backend == "triton":  # the interpreter is slow
        return dtype == torch.bfloat16 or case == "tokens"
    return backend != "cpu" or dtype != torch.float16  # (auto takes the reference there)


RUNS = [
    pytest.param(backend, dtype, case, id=f"{backend}-{name}-{case}")
    for backend in ("reference", "cpu", "triton")
    for name, dtype in DTYPES.items()
    for case in CASES
    if runs(backend, dtype, case)
]


def make_plan(ragged: Ragged, planned: bool) -> tuple[Tensor | None, int, int]:
    """A plan, its divisor, and the number of segments that it reads."""
    if not planned:
        return None, 1, ragged.segments
    sources = ragged.segments // 2 + 1  # some are read twice
    return torch.randperm(2 * sources)[: ragged.segments], 2, sources


def by_group(ragged: Ragged, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each group, padding left out."""
    return list(zip(*(t[: sum(ragged.counts)].split(ragged.counts) for t in tensors), strict=True))


def padded(ragged: Ragged, groups: list[Tensor]) -> Tensor:
    y = torch.cat(groups)
    return torch.cat((y, y.new_zeros(ragged.padding, *y.shape[1:])))


def check(
    op: Callable[[dict[str, Tensor]], Tensor],
    plain: Callable[[dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    inputs = {name: value.to(dtype).double() for name, value in inputs.items()}
    actual = outputs_and_gradients(lambda leaves: {"y": op(leaves)}, inputs, dtype)
    assert actual["y"].dtype == dtype
    exact, same = (
        outputs_and_gradients(lambda leaves: {"y": plain(leaves)}, inputs, d) for d in (torch.float64, dtype)
    )
    assert_all_accurate(actual, exact, same)


@pytest.mark.parametrize("planned", [False, True], ids=["in_place", "planned"])
@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
def test_m_grouped_gemm(ran_on, triton_device, case: str, backend: str, dtype: torch.dtype, planned: bool) -> None:
    ragged = CASES[case]
    device = triton_device if backend == "triton" else torch.device("cpu")
    plan, topk, sources = make_plan(ragged, planned)
    plan = plan if plan is None else plan.to(device)
    offsets = ragged.offsets.to(device)
    # Both layouts of w in one sum: the gradients of both are seen.
    inputs = {
        "x": torch.randn(sources, ragged.rows, ragged.k, device=device),
        "w_nt": torch.randn(len(ragged.counts), ragged.n, ragged.k, device=device),
        "w_nn": torch.randn(len(ragged.counts), ragged.k, ragged.n, device=device),
    }

    def op(leaves: dict[str, Tensor]) -> Tensor:
        y = m_grouped_gemm(leaves["x"], leaves["w_nt"], offsets, plan=plan, topk=topk)
        return y + m_grouped_gemm(leaves["x"], leaves["w_nn"], offsets, plan=plan, topk=topk, trans_w=False)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        x = leaves["x"] if plan is None else leaves["x"][plan // topk]
        groups = zip(by_group(ragged, x), leaves["w_nt"], leaves["w_nn"], strict=True)
        return padded(ragged, [rows @ nt.T + rows @ nn for (rows,), nt, nn in groups])

    with ran_on(backend, "grouped_gemm", "m_grouped_gemm", "m_grouped_gemm_bwd"):
        check(op, plain, inputs, dtype)


@pytest.mark.parametrize("planned", [False, True], ids=["in_place", "planned"])
@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
def test_m_grouped_swiglu(ran_on, triton_device, case: str, backend: str, dtype: torch.dtype, planned: bool) -> None:
    ragged = CASES[case]
    device = triton_device if backend == "triton" else torch.device("cpu")
    plan, topk, sources = make_plan(ragged, planned)
    plan = plan if plan is None else plan.to(device)
    offsets = ragged.offsets.to(device)
    weighted = case != "images"
    inputs = {
        "x": torch.randn(sources, ragged.rows, ragged.k, device=device),
        "w": torch.randn(len(ragged.counts), 2, ragged.n, ragged.k, device=device) * ragged.k**-0.5,
        "weights": torch.rand(ragged.segments, device=device),
    }
    if not weighted:
        inputs.pop("weights")

    def op(leaves: dict[str, Tensor]) -> Tensor:
        weights = leaves["weights"].to(torch.float32) if weighted else None
        return m_grouped_swiglu(leaves["x"], leaves["w"], offsets, weights=weights, plan=plan, topk=topk)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        x = leaves["x"] if plan is None else leaves["x"][plan // topk]
        weights = leaves["weights"][:, None, None] if weighted else x.new_ones(len(x), 1, 1)
        groups = zip(by_group(ragged, x, weights), leaves["w"], strict=True)
        return padded(ragged, [F.silu(rows @ gate.T) * (rows @ up.T) * own for (rows, own), (gate, up) in groups])

    with ran_on(backend, "grouped_gemm", "m_grouped_swiglu", "m_grouped_swiglu_bwd"):
        check(op, plain, inputs, dtype)


@pytest.mark.parametrize("planned", [False, True], ids=["in_place", "planned"])
@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
def test_k_grouped_gemm(ran_on, triton_device, case: str, backend: str, dtype: torch.dtype, planned: bool) -> None:
    ragged = CASES[case]
    device = triton_device if backend == "triton" else torch.device("cpu")
    plan, topk, sources = make_plan(ragged, planned)
    plan = plan if plan is None else plan.to(device)
    offsets = ragged.offsets.to(device)
    inputs = {
        "a": torch.randn(ragged.segments, ragged.rows, ragged.n, device=device),
        "b": torch.randn(sources, ragged.rows, ragged.k, device=device),
    }

    def op(leaves: dict[str, Tensor]) -> Tensor:
        return k_grouped_gemm(leaves["a"], leaves["b"], offsets, plan=plan, topk=topk)

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        b = leaves["b"] if plan is None else leaves["b"][plan // topk]
        groups = by_group(ragged, leaves["a"], b)
        return torch.stack([own.flatten(0, 1).T @ rows.flatten(0, 1) for own, rows in groups])

    with ran_on(backend, "grouped_gemm", "k_grouped_gemm"):
        check(op, plain, inputs, dtype)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    padding=st.integers(0, 3),
    rows=st.integers(1, 4),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    planned=st.booleans(),
)
def test_triton_on_any_ragged_shape(
    triton_device, counts: list[int], padding: int, rows: int, k: int, n: int, planned: bool
) -> None:
    ragged = Ragged(tuple(counts), padding=padding, rows=rows, k=k, n=n)
    plan, topk, sources = make_plan(ragged, planned)
    x, w = torch.randn(sources, rows, k).bfloat16(), torch.randn(len(counts), n, k).bfloat16()
    a = torch.randn(ragged.segments, rows, n).bfloat16()
    a[sum(counts) :] = float("nan")  # padding goes in nowhere
    on = [t if t is None else t.to(triton_device) for t in (x, w, a, ragged.offsets, plan)]
    y = triton_impl.m_grouped_gemm(on[0], on[1], on[3], on[4], topk, True)
    c = triton_impl.k_grouped_gemm(on[2], on[0], on[3], on[4], topk)
    exact = reference.m_grouped_gemm(x.double(), w.double(), ragged.offsets, plan, topk, True)
    assert_accurate("y", y.cpu(), exact, exact.bfloat16())
    exact = reference.k_grouped_gemm(a.double(), x.double(), ragged.offsets, plan, topk)
    assert_accurate("c", c.cpu(), exact, exact.bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's, in the interpreter
def test_nothing_leaks_between_groups(triton_device) -> None:
    """What is infinite in one group's rows or matrix stays there: overhanging tiles are masked, not multiplied by 0."""
    ragged = Ragged((3, 5), rows=7, k=40, n=40)
    x, w = torch.randn(8, 7, 40).bfloat16(), torch.randn(2, 40, 40).bfloat16()
    a = torch.randn(8, 7, 40).bfloat16()
    x[3:], w[1], a[3:] = float("inf"), float("inf"), float("inf")
    on = [t.to(triton_device) for t in (x, w, a, ragged.offsets)]
    for trans_w in (True, False):
        assert triton_impl.m_grouped_gemm(on[0], on[1], on[3], None, 1, trans_w)[:3].isfinite().all()
    assert triton_impl.k_grouped_gemm(on[2], on[0], on[3], None, 1)[0].isfinite().all()


def test_recomputation_saves_nothing_and_changes_nothing() -> None:
    ragged = CASES["tokens"]
    x, w = torch.randn(ragged.segments, ragged.k), torch.randn(4, 2, ragged.n, ragged.k)
    results = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t.numel()) or t, lambda t: t):
            h = m_grouped_swiglu(*leaves, ragged.offsets, recompute=recompute)
        assert (2 * ragged.segments * ragged.n in saved) != recompute
        h.square().sum().backward()
        results.append([h.detach(), *(leaf.grad for leaf in leaves)])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_rows_are_segments_of_one_row() -> None:
    ragged = CASES["tokens"]
    x, w = torch.randn(ragged.segments, ragged.k), torch.randn(4, ragged.n, ragged.k)
    y = m_grouped_gemm(x, w, ragged.offsets)
    assert torch.equal(y, m_grouped_gemm(x[:, None], w, ragged.offsets)[:, 0])
    assert torch.equal(k_grouped_gemm(y, x, ragged.offsets), k_grouped_gemm(y[:, None], x[:, None], ragged.offsets))


def token_moe(x: Tensor, w_gate_up: Tensor, w_down: Tensor, logits: Tensor) -> Tensor:
    """A token-routed MoE layer, step by step as with a dispatch between permute and the products."""
    route = topk_routing(logits, 2, renormalize=True)
    probs = route.probs.gather(1, route.topk_indices)
    rows, row_probs = permute(x, route.plan, topk=2, probs=probs)
    h = m_grouped_swiglu(rows, w_gate_up, route.expert_offsets, weights=row_probs)
    return unpermute(
        m_grouped_gemm(h, w_down, route.expert_offsets, trans_w=False), route.plan, topk=2, num_rows=len(x)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_token_routing_step_by_step_is_expert_mlp(compiled: bool) -> None:
    inputs = make_expert_inputs(MoEShape(images=9, rows=1, hidden=8, experts=4, ffn=12))
    function = torch.compile(token_moe, backend="aot_eager", fullgraph=True) if compiled else token_moe

    def steps(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": function(leaves["x"][:, 0], *list(leaves.values())[1:])}

    def whole(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        x, w_gate_up, w_down, logits = leaves.values()
        route = topk_routing(logits, 2, renormalize=True)
        return {"y": expert_mlp(x, w_gate_up, w_down, route.probs, plan=route)[:, 0]}

    exact = outputs_and_gradients(whole, inputs, torch.float64)
    same = outputs_and_gradients(whole, inputs, torch.float32)
    assert_all_accurate(outputs_and_gradients(steps, inputs, torch.float32), exact, same)


@pytest.mark.parametrize("planned", [False, True], ids=["in_place", "planned"])
def test_gradcheck(planned: bool) -> None:
    ragged = Ragged((2, 0, 1), padding=1, rows=2, k=3, n=2)
    plan, topk, sources = make_plan(ragged, planned)
    x = torch.randn(sources, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(ragged.segments, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        h = m_grouped_swiglu(x, w, ragged.offsets, weights=weights, plan=plan, topk=topk)
        return h, k_grouped_gemm(h, x, ragged.offsets, plan=plan, topk=topk)

    assert torch.autograd.gradcheck(function, (x, w, weights))


def test_wrong_shapes_are_named() -> None:
    x, offsets = torch.zeros(4, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"x must be \[J, 5\] or \[J, V, 5\], got \[4, 3\]"):
        m_grouped_gemm(x, torch.zeros(1, 2, 5), offsets)
    with pytest.raises(ValueError, match=r"offsets must be \[G \+ 1 = 3\], got \[2\]"):
        m_grouped_gemm(x, torch.zeros(2, 2, 3), offsets)
    with pytest.raises(ValueError, match=r"w_gate_up must be \[G, 2, I, K\], got \[1, 2, 3\]"):
        m_grouped_swiglu(x, torch.zeros(1, 2, 3), offsets)
    with pytest.raises(ValueError, match=r"weights must be \[4\], got \[3\]"):
        m_grouped_swiglu(x, torch.zeros(1, 2, 2, 3), offsets, weights=torch.zeros(3))
    with pytest.raises(ValueError, match=r"a must have 4 rows or segments, got 3"):
        k_grouped_gemm(torch.zeros(3, 2), x, offsets)
