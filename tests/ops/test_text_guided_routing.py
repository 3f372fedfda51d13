"""text_guided_routing: values and gradients against softmax(q K^T) K W^T sample by sample in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, make_spans, outputs_and_gradients
from parrot_sys.ops import text_guided_routing

BACKENDS = ["reference", "cpu", "triton"]
LAUNCHERS = ("text_guided_routing_fwd", "text_guided_routing_bwd")

# text lengths and images of each sample, hidden, experts
CASES = {
    "one_image": ([7], [1], 16, 6),
    "primes": ([5, 11, 3], [1, 2, 1], 13, 5),
    "shared_span": ([9, 4], [3, 2], 8, 4),  # several images of one sample read the same text
    "empty_span": ([6, 0, 5], [1, 1, 1], 16, 6),  # an image without guidance
    "one_expert": ([3], [2], 8, 1),
    "no_text": ([0], [2], 8, 3),
    "no_image": ([4], [0], 8, 3),  # a text-only micro-batch
    "nothing": ([0], [0], 8, 3),
    "long": ([130, 70], [2, 1], 64, 6),  # more rows than one task of the C++ loop takes
}


def make_inputs(
    lengths: list[int], images: list[int], hidden: int, experts: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    inputs = {
        "query": torch.randn(sum(images), hidden, dtype=torch.float64),
        "text": torch.randn(sum(lengths), hidden, dtype=torch.float64),
        "router_weight": torch.randn(experts, hidden, dtype=torch.float64) * hidden**-0.5,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def spans_on(device: torch.device, lengths: list[int], images: list[int]) -> tuple[Tensor, Tensor]:
    start, end = make_spans(lengths, images)
    return start.to(device), end.to(device)


def expression(tensors: dict[str, Tensor], start: Tensor, end: Tensor, scale: float) -> dict[str, Tensor]:
    """The formula, image by image, in the dtype of the inputs."""
    logits, lses = [], []
    for query, first, last in zip(tensors["query"], start.tolist(), end.tolist(), strict=True):
        span = tensors["text"][first:last]
        scores = span @ query * scale
        logits.append(tensors["router_weight"] @ (scores.softmax(0) @ span))
        lses.append(scores.logsumexp(0))
    if not logits:
        nothing = sum(tensor.sum() for tensor in tensors.values()) * 0  # so that all gradients exist, and are zero
        return {"logits": nothing * start.new_zeros(0, len(tensors["router_weight"])), "lse": nothing * start}
    return {"logits": torch.stack(logits), "lse": torch.stack(lses)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, device_of, case: str, backend: str, dtype: torch.dtype) -> None:
    lengths, images, hidden, experts = CASES[case]
    made = make_inputs(lengths, images, hidden, experts, device_of(backend))
    inputs = {k: v.to(dtype).double() for k, v in made.items()}
    start, end = spans_on(device_of(backend), lengths, images)
    scale = 1 / math.sqrt(hidden)

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        query, text, weight = leaves.values()
        logits, lse = text_guided_routing(query, text, start, end, weight, scale=scale)
        return {"logits": logits, "lse": lse}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return expression(leaves, start, end, scale)

    with ran_on(backend, "text_guided_routing", *LAUNCHERS):
        actual = outputs_and_gradients(op, inputs, dtype)
    assert actual["logits"].dtype == actual["lse"].dtype == torch.float32
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_span_is_uniform_and_has_no_gradient(ran_on, device_of, backend: str) -> None:
    device = device_of(backend)
    inputs = {k: v.float().requires_grad_() for k, v in make_inputs([0, 3], [1, 1], 8, 4, device).items()}
    start, end = spans_on(device, [0, 3], [1, 1])
    with ran_on(backend, "text_guided_routing", *LAUNCHERS):
        logits, lse = text_guided_routing(
            inputs["query"], inputs["text"], start, end, inputs["router_weight"], scale=0.5
        )
        logits[0].sum().backward()
    assert logits[0].softmax(0).tolist() == [0.25] * 4
    assert lse[0] == float("-inf")
    for name, tensor in inputs.items():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_may_be_a_strided_view_and_spans_int64(ran_on, device_of, backend: str) -> None:
    """The module passes features[:, 0]."""
    device = device_of(backend)
    inputs = {k: v.float() for k, v in make_inputs([4, 2], [1, 2], 8, 3, device).items()}
    start, end = spans_on(device, [4, 2], [1, 2])
    features = torch.randn(3, 5, 8, device=device)
    features[:, 0] = inputs["query"]
    with ran_on(backend, "text_guided_routing", "text_guided_routing_fwd"):
        strided, _ = text_guided_routing(
            features[:, 0], inputs["text"], start.long(), end.long(), inputs["router_weight"], scale=0.3
        )
        dense, _ = text_guided_routing(inputs["query"], inputs["text"], start, end, inputs["router_weight"], scale=0.3)
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["query", "text", "router_weight"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(ran_on, device_of, backend: str, frozen: str) -> None:
    device = device_of(backend)
    inputs = {k: v.float() for k, v in make_inputs([4, 3], [2, 1], 8, 3, device).items()}
    start, end = spans_on(device, [4, 3], [2, 1])
    grads = []
    for freeze in (None, frozen):
        leaves = {k: v.clone().requires_grad_(k != freeze) for k, v in inputs.items()}
        with ran_on(backend, "text_guided_routing", *LAUNCHERS):
            logits, _ = text_guided_routing(
                leaves["query"], leaves["text"], start, end, leaves["router_weight"], scale=0.3
            )
            logits.square().sum().backward()
        grads.append({k: v.grad for k, v in leaves.items()})
    assert grads[1].pop(frozen) is None
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name]), name


def test_gradcheck() -> None:
    inputs = make_inputs([3, 4], [2, 1], 5, 3)
    start, end = make_spans([3, 4], [2, 1])
    leaves = [v.requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda query, text, weight: text_guided_routing(query, text, start, end, weight, scale=0.4), leaves
    )


def test_span_outside_the_text_is_an_error_on_the_cpu() -> None:
    inputs = {k: v.float() for k, v in make_inputs([4], [1], 8, 3).items()}
    start, end = torch.tensor([0]), torch.tensor([9])
    with pytest.raises(RuntimeError, match=r"span of image 0 must lie in \[0, 4\], got \[0, 9\)"):
        text_guided_routing(inputs["query"], inputs["text"], start, end, inputs["router_weight"], scale=0.3)
