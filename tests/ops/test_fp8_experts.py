"""fp8_experts: bits of the quantised operands, products against float64, and how far float8 may be from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels import triton_support
from parrot_kernels.expert_mlp import reference as expert_reference
from parrot_kernels.fp8_experts import reference, triton_impl
from parrot_kernels.fp8_experts.reference import BLOCK, LARGEST, rounded_rows, rounded_weights
from parrot_kernels.testing import MoEShape, make_expert_inputs
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import TextGuidedMoE
from parrot_sys.ops import expert_mlp, topk_routing
from tests.ops.fp8_expression import (
    assert_add_up,
    assert_within_bound,
    grouped_inputs,
    grouped_products,
    rounding,
    row_scales,
    weight_scales,
)

BACKENDS = ["reference", "triton"]
DTYPES = [torch.bfloat16, *([torch.float32] if triton_support.INTERPRETING else [])]
# Rows that end within a tile, sums that end within a second block of 128, an expert of which nothing is chosen.
SHAPE = MoEShape(images=2, rows=5, hidden=144, experts=3, ffn=144, topk=1)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 300), st.integers(-30, 30), st.booleans())
@example(3, 130, 0, True)
def test_quantised_operands_are_the_same_bits_and_within_half_a_place(
    triton_device: torch.device, rows: int, width: int, exponent: int, transposed: bool
) -> None:
    """Magnitudes from 2^-60 to 2^60 of the largest, a block of zeros, and widths that are no multiple of anything."""
    x = torch.randn(2, rows, width) * 2.0 ** torch.randint(-30, 31, (2, rows, width)) * 2.0**exponent
    x[0, :, :BLOCK] = 0
    rows_q, rows_s = reference.quantize_rows(x)
    q, scales = triton_impl.quantize_rows(x.to(triton_device))
    assert torch.equal(q.cpu().view(torch.uint8), rows_q.view(torch.uint8))
    assert torch.equal(scales.cpu(), rows_s)
    exact = x.double()
    assert bool(((rounded_rows(x).double() - exact).abs() <= rounding(exact, row_scales(exact)) * (1 + 1e-6)).all())

    w = x.mT.contiguous() if transposed else x
    weights_q, weights_s = reference.quantize_weights(w, transposed)
    q, scales = triton_impl.quantize_weights(w.to(triton_device), transposed)
    assert q.shape == x.shape
    assert torch.equal(q.cpu().view(torch.uint8), weights_q.view(torch.uint8))
    assert torch.equal(scales.cpu(), weights_s)
    bound = rounding(exact, weight_scales(exact)) * (1 + 1e-6)
    assert bool(((rounded_weights(x).double() - exact).abs() <= bound).all())


# (The tensor cores of Hopper add up float8 with some 14 bits: too few for results in float32.)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_add_up_exactly_what_is_quantised(ran_on, triton_device: torch.device, dtype: torch.dtype) -> None:
    inputs = grouped_inputs(2, 144, 48, dtype)
    stored = torch.randn(5, 2, 48).to(dtype)
    with ran_on("triton", "fp8_experts", "m_grouped_gemm", "m_grouped_swiglu"):
        actual = grouped_products(inputs, stored, triton_device)
    assert_add_up(actual, inputs, stored)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "topk"])
def test_experts_are_as_near_to_float64_as_the_bound_says(ran_on, device_of, backend: str, form: str) -> None:
    inputs = {name: value.bfloat16().double() for name, value in make_expert_inputs(SHAPE).items()}
    x, gate_up, down = inputs["x"], inputs["w_gate_up"], inputs["w_down"]
    device = device_of(backend)
    probs = inputs["logits"].float().softmax(-1)
    plan = None
    if form == "topk":
        plan = topk_routing(inputs["logits"].float(), SHAPE.topk, renormalize=True)
        probs = plan.probs
    chosen = probs > 0
    tensors = [t.bfloat16().to(device) for t in (x, gate_up, down)]
    on_device = None if plan is None else type(plan)(*(t.to(device) if isinstance(t, Tensor) else t for t in plan))
    with ran_on(backend, "fp8_experts", f"expert_mlp_{form}_fwd"):
        y = expert_mlp(*tensors, probs.to(device), plan=on_device, residual_scale=0.5, output_scale=0.7, fp8=True)

    assert_within_bound(y.cpu(), x, gate_up, down, probs * chosen, residual_scale=0.5, output_scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_stored_preactivations(ran_on, device_of, backend: str) -> None:
    device = device_of(backend)
    inputs = {name: value.to(device, torch.bfloat16) for name, value in make_expert_inputs(SHAPE).items()}
    leaves = [inputs[name].requires_grad_() for name in ("x", "w_gate_up", "w_down")]
    probs = inputs["logits"].float().softmax(-1)
    with ran_on(backend, "fp8_experts", "expert_mlp_dense_fwd"):
        y = expert_mlp(*leaves, probs, residual_scale=0.5, fp8=True)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    detached = [leaf.detach().cpu() for leaf in leaves]
    _, z = reference.expert_mlp_dense_fwd(*detached, probs.cpu(), (0.5, 1.0), True)
    upstream = torch.ones_like(y).cpu()
    wanted = expert_reference.expert_mlp_dense_bwd(
        upstream, *detached, probs.cpu(), z, (0.5, 1.0), (True, True, True, False)
    )
    for own, other in zip(grads, wanted, strict=False):
        torch.testing.assert_close(own.cpu(), other, rtol=2**-6, atol=2**-6 * float(other.abs().max()))


@pytest.mark.parametrize("routing", ["dense", "topk"])
def test_module_takes_the_option_with_and_without_the_fused_op(routing: str) -> None:
    settings_ = {"num_experts": 4, "ffn_hidden_size": 48, "routing": routing}
    features, text = torch.randn(2, 5, 32), torch.randn(9, 32)
    spans = torch.tensor([0, 4]), torch.tensor([4, 9])
    outputs = []
    for options in ({}, {"fp8": True}, {"fp8": True, "aux_loss_coeff": 0.1}):
        torch.manual_seed(0)
        layer = TextGuidedMoE(TextGuidedMoEConfig(**settings_, **options), 32)
        outputs.append(layer(features, text, *spans)[0].detach())
    difference = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert 2**-14 < difference < 2**-4
    # Their routes may differ in a last bit, which may round one of the 1,920 hidden values to the next fp8 number.
    assert (outputs[2] - outputs[1]).norm() <= 0.1 * (outputs[1] - outputs[0]).norm()


def test_reasons_for_a_refusal(triton_device: torch.device) -> None:
    x, w = torch.zeros(2, 3, 24, device=triton_device), torch.zeros(1, 2, 16, 24, device=triton_device)
    assert triton_impl.why_not(x, w) == "each width must be a multiple of 16, got 24"
    assert triton_impl.why_not(x[..., :16], w[..., :16]) is None
    assert math.isclose(LARGEST, torch.finfo(torch.float8_e4m3fn).max)
