"""The CUDA products of float8: on a GPU if there is one, else their sources compiled for the CPU (tests/cuda_emulator).

Tiles are 128 rows by 128 columns (SwiGLU: 64 units); 128 numbers of the reduction are a stage and share scales.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parrot_kernels.fp8_experts import cuda_impl, reference
from parrot_kernels.testing import MoEShape, make_expert_inputs
from parrot_sys.ops import ExpertPlan, expert_mlp, topk_routing
from tests import cuda_emulator
from tests.ops.fp8_expression import assert_add_up, assert_within_bound, grouped_inputs, grouped_products

# Rows of a segment, widths: rows that end within a tile, sums that end within the eighth block, columns left over.
FORMS = {
    "tokens": (1, 48, 80),
    "gathered_images": (70, 272, 144),  # two tiles of units and of columns
    "ring": (1, 7 * 128 + 16, 16),  # more stages than the ring has
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_products_add_up_exactly_what_is_quantised(ran_on, cuda_device, form: str, dtype: torch.dtype) -> None:
    rows, k, n = FORMS[form]
    inputs = grouped_inputs(rows, k, n, dtype)
    stored = torch.randn(5, rows, n).to(dtype)
    with ran_on("cuda", "fp8_experts", "m_grouped_gemm", "m_grouped_swiglu"), cuda_emulator.device(seed=1):
        actual = grouped_products(inputs, stored, cuda_device)
    assert_add_up(actual, inputs, stored)


SHAPES = {
    # An odd number of row blocks and of columns: tiles that lie outside. An expert of more than one step.
    "odd": MoEShape(images=1, rows=130, hidden=272, experts=2, ffn=144, topk=1),
    "images": MoEShape(images=2, rows=66, hidden=16, experts=3, ffn=48, topk=2),
}


@pytest.mark.parametrize("multiprocessors", [2, 6])  # six are three clusters: a reduction of the last wave is split
@pytest.mark.parametrize("form", ["dense", "topk"])
@pytest.mark.parametrize("name", SHAPES)
def test_experts_are_as_near_to_float64_as_the_bound_says(
    ran_on, cuda_device, name: str, form: str, multiprocessors: int
) -> None:
    shape = SHAPES[name]
    inputs = {key: value.bfloat16().double() for key, value in make_expert_inputs(shape).items()}
    x, gate_up, down = inputs["x"], inputs["w_gate_up"], inputs["w_down"]
    probs, plan = inputs["logits"].float().softmax(-1), None
    if form == "topk":
        route = topk_routing(inputs["logits"].float(), shape.topk, renormalize=True)
        probs, plan = route.probs, type(route)(*(tensor.to(cuda_device) for tensor in route))
    tensors = [t.to(cuda_device, torch.bfloat16) for t in (x, gate_up, down)]
    options = {"plan": plan, "residual_scale": 0.5, "output_scale": 0.7, "fp8": True}
    launcher = f"expert_mlp_{form}_fwd"
    with ran_on("cuda", "fp8_experts", launcher), cuda_emulator.device(multiprocessors=multiprocessors):
        y = expert_mlp(*tensors, probs.to(cuda_device), **options)
    assert_within_bound(y.cpu(), x, gate_up, down, probs, residual_scale=0.5, output_scale=0.7)


def test_images_without_some_of_their_experts_and_no_order_of_threads_changes_a_bit(ran_on, cuda_device) -> None:
    """One image has no expert, one lacks a choice, as on a rank of expert parallelism; pre-activations are kept."""
    shape = MoEShape(images=3, rows=64, hidden=144, experts=2, ffn=144, topk=2)
    inputs = {name: value.bfloat16() for name, value in make_expert_inputs(shape).items()}
    tensors = [inputs[name] for name in ("x", "w_gate_up", "w_down")]
    probs = inputs["logits"].float().softmax(-1)
    indices = torch.tensor([[0, 1], [0, 1], [1, 0]])
    plan, offsets = torch.tensor([0, 5, 4]), torch.tensor([0, 2, 3], dtype=torch.int32)
    route = ExpertPlan(indices, offsets, plan)
    args = (*tensors, probs, *route)
    results = []
    for seed, multiprocessors in ((0, 6), (1, 6), (2, 2)):
        with cuda_emulator.device(seed=seed, multiprocessors=multiprocessors):
            own = [t.to(cuda_device) for t in args]
            results.append([t.cpu() for t in cuda_impl.expert_mlp_topk_fwd(*own, (0.5, 0.7), True)])
    for first, second in zip(results[0], results[1], strict=True):
        assert torch.equal(first, second)
    _, wanted = reference.expert_mlp_topk_fwd(*args, (0.5, 0.7), True)
    chosen = probs * torch.tensor([[1, 0], [0, 0], [1, 1]])  # image by expert
    exact = [tensor.double() for tensor in tensors]
    for y, z in results[1:]:
        torch.testing.assert_close(z, wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))
        assert_within_bound(y, *exact, chosen, residual_scale=0.5, output_scale=0.7)


def test_reasons_for_a_refusal(cuda_device: torch.device) -> None:
    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device=cuda_device)

    x, w = empty(2, 3, 24), empty(1, 2, 16, 24)
    assert cuda_impl.why_not(x, w, None, None, 1, None) == "each width must be a multiple of 16, got 24"
    assert cuda_impl.why_not(empty(2, 3, 16), empty(1, 2, 16, 16), None, None, 1, None) is None
    probs = empty(2, 1, dtype=torch.float32)
    assert cuda_impl.why_not(empty(2, 3, 16), empty(1, 2, 48, 16), empty(1, 48, 16), probs) is None
    wanted = "each width must be a multiple of 16, got 24"
    assert cuda_impl.why_not(empty(2, 3, 16), empty(1, 2, 24, 16), empty(1, 24, 16), probs) == wanted


def test_host_checks_name_what_is_wrong(cuda_device: torch.device) -> None:
    x = torch.zeros(2, 3, 32, device=cuda_device).to(torch.float8_e4m3fn)
    w, offsets = torch.zeros(1, 16, 32, device=cuda_device).to(x.dtype), torch.tensor([0, 2], device=cuda_device)
    x_scales, w_scales = torch.ones(2, 3, 1, device=cuda_device), torch.ones(1, 1, 1, device=cuda_device)
    y = torch.empty(2, 3, 16, dtype=torch.bfloat16, device=cuda_device)
    op = torch.ops.parrot_ext.m_grouped_gemm_fp8_cuda
    op(x, x_scales, w, w_scales, offsets, None, 1, y)
    with pytest.raises(RuntimeError, match=r"x_scales must have shape \[2, 3, 1\], got \[2, 3, 2\]"):
        op(x, x_scales.repeat(1, 1, 2), w, w_scales, offsets, None, 1, y)
    with pytest.raises(RuntimeError, match="x must have dtype Float8_e4m3fn, got Byte"):
        op(x.view(torch.uint8), x_scales, w, w_scales, offsets, None, 1, y)
    with pytest.raises(RuntimeError, match="y must be bfloat16 or float16, got Float"):
        op(x, x_scales, w, w_scales, offsets, None, 1, y.float())
