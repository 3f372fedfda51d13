"""What the contracts promise of the raw launchers: gradients on demand, and refusals of the C++ loops."""

from __future__ import annotations

import importlib

import pytest
import torch

from parrot_kernels import _extension, compile_only, triton_support
from parrot_kernels.expert_mlp import cpu_impl as expert_cpu
from parrot_kernels.expert_mlp import reference as expert_reference
from parrot_kernels.linear_cross_entropy import reference as cross_entropy_reference
from parrot_kernels.testing import MoEShape, make_expert_inputs, make_spans, max_error, poisoned_memory
from parrot_kernels.text_guided_routing import cpu_impl as routing_cpu
from parrot_kernels.text_guided_routing import reference as routing_reference
from parrot_kernels.text_guided_routing import triton_impl as routing_triton
from parrot_kernels.topk_routing import reference as topk_reference


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    """A launcher may be called after `why_not` has allowed it, which also loads the C++ loops."""
    assert _extension.why_not() is None


SHAPE = MoEShape(images=3, rows=4, hidden=8, experts=4, ffn=6, topk=2)


def one_hot_needs(count: int) -> list[tuple[bool, ...]]:
    return [tuple(i == wanted for i in range(count)) for wanted in range(count)]


@pytest.mark.parametrize("impl", [expert_reference, expert_cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("needs", one_hot_needs(4))
def test_expert_mlp_computes_only_what_is_needed(impl, needs: tuple[bool, ...]) -> None:
    inputs = make_expert_inputs(SHAPE, torch.float32)
    probs, *_, indices, _, offsets, plan = topk_reference.topk_routing_fwd(inputs.pop("logits"), SHAPE.topk, True)
    tensors = (*inputs.values(), probs)
    grad = torch.randn(SHAPE.images, SHAPE.rows, SHAPE.hidden)
    for form, route in (("dense", ()), ("topk", (indices, offsets, plan))):
        _, z = getattr(impl, f"expert_mlp_{form}_fwd")(*tensors, *route, (0.1, 1.0), True)
        bwd = getattr(impl, f"expert_mlp_{form}_bwd")
        full = bwd(grad, *tensors, *route, z, (0.1, 1.0), (True,) * 4)
        some = bwd(grad, *tensors, *route, z, (0.1, 1.0), needs)
        for wanted, own, all_of_it in zip(needs, some, full, strict=True):
            assert torch.equal(own, all_of_it) if wanted else own.shape == (0,)


@pytest.mark.parametrize("impl", [routing_reference, routing_cpu, routing_triton], ids=["reference", "cpu", "triton"])
@pytest.mark.parametrize("needs", one_hot_needs(3))
def test_text_guided_routing_computes_only_what_is_needed(impl, needs: tuple[bool, ...]) -> None:
    device = "cuda" if impl is routing_triton and not triton_support.INTERPRETING else "cpu"
    inputs = (torch.randn(3, 8), torch.randn(9, 8), *make_spans([5, 4], [2, 1]), torch.randn(4, 8))
    args = tuple(tensor.to(device) for tensor in inputs)
    logits, lse = impl.text_guided_routing_fwd(*args, 0.3)
    grad = torch.randn_like(logits)
    full = impl.text_guided_routing_bwd(grad, None, *args, logits, lse, 0.3, (True,) * 3)
    some = impl.text_guided_routing_bwd(grad, None, *args, logits, lse, 0.3, needs)
    for wanted, own, all_of_it in zip(needs, some, full, strict=True):
        assert torch.equal(own, all_of_it) if wanted else own.shape == (0,)


@pytest.mark.parametrize("needs", one_hot_needs(2))
def test_linear_cross_entropy_computes_only_what_is_needed(needs: tuple[bool, bool]) -> None:
    args = (torch.randn(3, 8), torch.randn(20, 8), torch.tensor([4, 0, 19]))
    lse, _ = cross_entropy_reference.linear_cross_entropy_fwd(*args, 0)
    grads = torch.randn(3), torch.randn(3)
    full = cross_entropy_reference.linear_cross_entropy_bwd(*grads, *args, lse, 0, (True, True))
    some = cross_entropy_reference.linear_cross_entropy_bwd(*grads, *args, lse, 0, needs)
    for wanted, own, all_of_it in zip(needs, some, full, strict=True):
        assert torch.equal(own, all_of_it) if wanted else own.shape == (0,)


@pytest.mark.parametrize("width", [1, 7, 8, 40, 129])
def test_swiglu_over_the_whole_range_of_exp(width: int) -> None:
    """Gates far beyond where exp overflows; widths that are no multiple of a vector."""
    z = torch.linspace(-200, 200, 2 * width).repeat(3, 2, 1, 1).reshape(3, 2, 1, 2, width)
    z[:, :, :, 1] = z[:, :, :, 1].flip(-1) / 200 + 1
    weights = torch.rand(3, 1)
    gate, up = z.double().unbind(-2)
    with poisoned_memory():
        h = torch.empty(3, 2, 1, width)
        torch.ops.parrot_ext.swiglu_fwd(z, weights, h)
    exact = torch.nn.functional.silu(gate) * up * weights.double()[:, None, :, None]
    # exp is clamped at 88, so that silu(-200) comes out as -1e-36 and not as a true -1e-85.
    assert max_error(h, exact) <= 4 * torch.finfo(torch.float32).eps * float(exact.abs().max()) + 1e-35


def test_swiglu_keeps_nan() -> None:
    z = torch.zeros(1, 1, 1, 2, 9)
    z[..., 0, 4] = float("nan")
    h = torch.empty(1, 1, 1, 9)
    torch.ops.parrot_ext.swiglu_fwd(z, torch.ones(1, 1), h)
    assert h.isnan().flatten().tolist() == [i == 4 for i in range(9)]


def test_cpp_loops_name_what_is_wrong() -> None:
    z = torch.zeros(2, 3, 1, 2, 4)
    with pytest.raises(RuntimeError, match=r"weights must have shape \[2, 1\], got \[2, 2\]"):
        torch.ops.parrot_ext.swiglu_fwd(z, torch.zeros(2, 2), torch.zeros(2, 3, 1, 4))
    with pytest.raises(RuntimeError, match=r"z must have dtype Float, got Double"):
        torch.ops.parrot_ext.swiglu_fwd(z.double(), torch.zeros(2, 1), torch.zeros(2, 3, 1, 4).double())
    with pytest.raises(RuntimeError, match=r"z must be contiguous"):
        torch.ops.parrot_ext.swiglu_fwd(z.transpose(0, 1), torch.zeros(3, 1), torch.zeros(2, 3, 1, 4))
    with pytest.raises(RuntimeError, match=r"topk must be in \[1, num_experts=3\], got 4"):
        torch.ops.parrot_ext.topk_routing_fwd(torch.zeros(2, 3), 4, False, False, 1.0, 1, 1, None)
    with pytest.raises(RuntimeError, match=r"num_groups must divide num_experts=3, got 2"):
        torch.ops.parrot_ext.topk_routing_fwd(torch.zeros(2, 3), 1, False, False, 1.0, 2, 1, None)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[3\], got \[2\]"):
        torch.ops.parrot_ext.topk_routing_fwd(torch.zeros(2, 3), 1, False, False, 1.0, 1, 1, torch.zeros(2))


@pytest.mark.parametrize("op", compile_only.op_names())
def test_references_read_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Meta tensors have none, so asking for one raises. (`compile_only` calls the Triton launchers in the same way.)"""
    cases = importlib.import_module(f"parrot_kernels.{op}.compile_cases")
    monkeypatch.setattr(cases, "triton_impl", importlib.import_module(f"parrot_kernels.{op}.reference"))
    for case in cases.CASES:
        case.run()
