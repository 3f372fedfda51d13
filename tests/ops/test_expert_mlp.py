"""expert_mlp: values and gradients against a loop over images and experts in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import MoEShape, assert_all_accurate, make_expert_inputs, outputs_and_gradients, worst_of
from parrot_sys.ops import ExpertPlan, TopKRouting, expert_mlp, topk_routing
from tests.ops.expert_expression import expression, launchers

RESIDUAL, OUTPUT = 0.3, 1.7

CASES = {
    "plain": MoEShape(images=3, rows=5, hidden=16, experts=6, ffn=24, topk=2),
    "width_40": MoEShape(images=2, rows=17, hidden=32, experts=6, ffn=40, topk=2),  # I that no block size divides
    "primes": MoEShape(images=5, rows=7, hidden=13, experts=3, ffn=11, topk=2),
    "one_row": MoEShape(images=1, rows=1, hidden=8, experts=4, ffn=3, topk=1),
    "tokens": MoEShape(images=9, rows=1, hidden=8, experts=4, ffn=8, topk=2),  # V = 1 is token-level routing
    "all_chosen": MoEShape(images=2, rows=3, hidden=8, experts=4, ffn=8, topk=4),
    "one_expert": MoEShape(images=3, rows=4, hidden=8, experts=1, ffn=8, topk=1),
    "empty_experts": MoEShape(images=1, rows=6, hidden=8, experts=6, ffn=8, topk=2),  # four experts have no image
    "no_image": MoEShape(images=0, rows=4, hidden=8, experts=3, ffn=8, topk=2),
    # Several tasks of the C++ loop an image, and enough rows for Triton to sum over experts within one product.
    "long": MoEShape(images=2, rows=66, hidden=24, experts=3, ffn=40, topk=2),
    "long_primes": MoEShape(images=2, rows=67, hidden=13, experts=3, ffn=11, topk=2),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def runs(backend: str, dtype: torch.dtype, case: str) -> bool:
    if backend == "triton":  # the interpreter is slow
        return case == "width_40" if dtype != torch.bfloat16 else case != "plain"
    return backend != "cpu" or dtype != torch.float16  # (auto takes the reference there)


RUNS = [
    pytest.param(backend, dtype, case, id=f"{backend}-{name}-{case}")
    for backend in ("reference", "cpu", "triton")
    for name, dtype in DTYPES.items()
    for case in CASES
    if runs(backend, dtype, case)
]


def make_inputs(shape: MoEShape, sparse: bool) -> tuple[dict[str, Tensor], TopKRouting | None]:
    """Tensors of the op with weights of experts as a leaf of its own, and the plan of the top-k form."""
    inputs = make_expert_inputs(shape)
    logits = inputs.pop("logits")
    inputs["probs"] = logits.softmax(-1)
    return inputs, topk_routing(logits, shape.topk, renormalize=False) if sparse else None


def on_device(route: TopKRouting | None, device: torch.device | str) -> TopKRouting | None:
    return None if route is None else TopKRouting(*(tensor.to(device) for tensor in route))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "topk"])
@pytest.mark.parametrize(("backend", "dtype", "case"), RUNS)
def test_matches_float64(ran_on, triton_device, case: str, backend: str, sparse: bool, dtype: torch.dtype) -> None:
    device = triton_device if backend == "triton" else "cpu"
    inputs, route = make_inputs(CASES[case], sparse)
    inputs, route = {name: value.to(device, dtype).double() for name, value in inputs.items()}, on_device(route, device)

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        probs = leaves["probs"].float()
        tensors = (leaves["x"], leaves["w_gate_up"], leaves["w_down"], probs)
        return {"y": expert_mlp(*tensors, plan=route, residual_scale=RESIDUAL, output_scale=OUTPUT)}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": expression(leaves, leaves["probs"] * (1 if route is None else route.probs > 0), RESIDUAL, OUTPUT)}

    with ran_on(backend, "expert_mlp", *launchers(sparse)):
        actual = outputs_and_gradients(op, inputs, dtype)
    assert actual["y"].dtype == dtype

    def in_reverse(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        widths = {"x": (2,), "w_gate_up": (2, 3), "w_down": (1, 2)}
        turned = {name: leaf.flip(widths.get(name, ())) for name, leaf in leaves.items()}
        return {"y": plain(turned)["y"].flip(-1)}

    exact = outputs_and_gradients(plain, inputs, torch.float64)
    orders = [outputs_and_gradients(own, inputs, dtype) for own in (plain, in_reverse)]
    assert_all_accurate(actual, exact, worst_of(exact, *orders))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_all_images_to_one_expert(ran_on, triton_device, backend: str) -> None:
    shape = MoEShape(images=4, rows=3, hidden=8, experts=5, ffn=8, topk=1)
    device = triton_device if backend == "triton" else "cpu"
    inputs = {name: value.to(device) for name, value in make_expert_inputs(shape).items()}
    logits = inputs.pop("logits")
    logits[:, 3] += 100.0
    route = topk_routing(logits.float(), 1, renormalize=False)
    inputs["probs"] = logits.softmax(-1)

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": expert_mlp(*leaves.values(), plan=route)}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": expression(leaves, leaves["probs"] * (route.probs > 0), residual=0.0, scale=1.0)}

    with ran_on(backend, "expert_mlp", *launchers(sparse=True)):
        actual = outputs_and_gradients(op, inputs, torch.float32)
    assert not actual["grad_w_down"][[0, 1, 2, 4]].any()
    plain_results = [outputs_and_gradients(plain, inputs, dtype) for dtype in (torch.float64, torch.float32)]
    assert_all_accurate(actual, *plain_results)


@pytest.mark.parametrize("rows", [5, 66])  # few rows an image and many take different ways in Triton
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_plan_that_lacks_pairs(ran_on, triton_device, backend: str, rows: int) -> None:
    """Experts of one rank: an image may have none of them here, or fewer than K."""
    shape = MoEShape(images=4, rows=rows, hidden=16, experts=3, ffn=24, topk=2)
    device = triton_device if backend == "triton" else "cpu"
    inputs = {name: value.to(device) for name, value in make_expert_inputs(shape).items()}
    inputs["probs"] = inputs.pop("logits").softmax(-1)
    # Image 0 chose experts 2 and 0, image 1 none, image 2 expert 2, image 3 expert 0 in its second slot.
    indices = torch.tensor([[2, 0], [1, 1], [2, 0], [1, 0]], device=device)
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
    route = ExpertPlan(indices, offsets, torch.tensor([1, 7, 0, 4], device=device))
    chosen = torch.zeros(4, 3, device=device)
    chosen[[0, 0, 2, 3], [2, 0, 2, 0]] = 1

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": expert_mlp(*leaves.values(), plan=route, residual_scale=RESIDUAL, output_scale=OUTPUT)}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": expression(leaves, leaves["probs"] * chosen, RESIDUAL, OUTPUT)}

    with ran_on(backend, "expert_mlp", *launchers(sparse=True)):
        actual = outputs_and_gradients(op, inputs, torch.float32)
    plain_results = [outputs_and_gradients(plain, inputs, dtype) for dtype in (torch.float64, torch.float32)]
    assert_all_accurate(actual, *plain_results)


def _op_tensors(
    shape: MoEShape, *, grad: bool = True, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    tensors = make_expert_inputs(shape, torch.float32, device)
    probs = topk_routing(tensors.pop("logits"), shape.topk, renormalize=True).probs
    return {name: value.requires_grad_(grad) for name, value in tensors.items()}, probs.requires_grad_(grad)


def _saved_bytes(tensors: dict[str, Tensor], probs: Tensor, plan, recompute: bool) -> int:
    """Bytes of the distinct storages kept for the backward pass, inputs not counted."""
    inputs = {t.untyped_storage().data_ptr() for t in (*tensors.values(), probs)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs and tensor.is_floating_point():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = expert_mlp(*tensors.values(), probs, plan=plan, recompute=recompute)
    y.sum().backward()
    return sum(saved.values())


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "topk"])
def test_recompute_saves_only_x_and_gives_the_same(ran_on, triton_device, backend: str, sparse: bool) -> None:
    shape = CASES["plain"]
    tensors, probs = _op_tensors(shape, device=triton_device if backend == "triton" else "cpu")
    route = topk_routing(probs.detach(), shape.topk, renormalize=True) if sparse else None
    pairs = shape.images * (shape.topk if sparse else shape.experts)
    results = []
    for recompute in (False, True):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (*tensors.values(), probs)]
        with ran_on(backend, "expert_mlp", *launchers(sparse)):
            saved = _saved_bytes(dict(zip(tensors, leaves, strict=False)), leaves[-1], route, recompute)
        assert saved == (0 if recompute else pairs * shape.rows * 2 * shape.ffn * 4)
        results.append([leaf.grad for leaf in leaves])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(again, plain)


@pytest.mark.parametrize(
    ("backend", "sparse"),
    # (Triton's two forms share their backward pass.)
    [("reference", False), ("reference", True), ("cpu", False), ("cpu", True), ("triton", True)],
)
@pytest.mark.parametrize("frozen", ["x", "w_gate_up", "w_down", "probs"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(
    ran_on, triton_device, backend: str, sparse: bool, frozen: str
) -> None:
    shape = CASES["plain"]
    tensors, probs = _op_tensors(shape, grad=False, device=triton_device if backend == "triton" else "cpu")
    route = topk_routing(probs, shape.topk, renormalize=True) if sparse else None
    grads = []
    for freeze in (None, frozen):
        leaves = {k: v.clone().requires_grad_(k != freeze) for k, v in (tensors | {"probs": probs}).items()}
        with ran_on(backend, "expert_mlp", *launchers(sparse)):
            expert_mlp(*leaves.values(), plan=route, residual_scale=1.0).square().sum().backward()
        grads.append({k: v.grad for k, v in leaves.items()})
    assert grads[1].pop(frozen) is None
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name]), name


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "topk"])
def test_gradcheck(sparse: bool) -> None:
    shape = MoEShape(images=2, rows=2, hidden=3, experts=3, ffn=2, topk=2)
    inputs = [value.requires_grad_() for value in make_expert_inputs(shape).values()]

    def function(x: Tensor, w_gate_up: Tensor, w_down: Tensor, logits: Tensor) -> Tensor:
        route = topk_routing(logits, shape.topk, renormalize=True)
        plan = route if sparse else None
        return expert_mlp(x, w_gate_up, w_down, route.probs, plan=plan, residual_scale=0.5, output_scale=2.0)

    assert torch.autograd.gradcheck(function, inputs)
