"""topk_routing: weights and gradients against softmax + topk in float64; indices, counts and plan exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import topk_routing

LAUNCHERS = ("topk_routing_fwd", "topk_routing_bwd")

# rows, experts, topk
CASES = {
    "top1": (5, 6, 1),
    "top2": (7, 6, 2),
    "all": (4, 6, 6),  # dense routing
    "one_expert": (3, 1, 1),
    "one_row": (1, 5, 3),
    "no_row": (0, 6, 2),
    "primes": (131, 13, 7),  # more rows than one task of the C++ loop takes
    "many": (3, 256, 16),
}


def expression(leaves: dict[str, Tensor], topk: int, renormalize: bool) -> dict[str, Tensor]:
    """Plain PyTorch; random logits have no ties, so that torch.topk chooses the same experts."""
    logits = leaves["logits"]
    scores = logits.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, logits.topk(topk).indices, 1.0)
    probs = scores * chosen
    if renormalize:
        probs = probs / probs.sum(-1, keepdim=True)
    return {"probs": probs, "scores": scores, "lse": logits.logsumexp(-1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, case: str, backend: str, renormalize: bool, dtype: torch.dtype) -> None:
    rows, experts, topk = CASES[case]
    # A shuffled ladder of at most 256 steps is exact in bfloat16, where random numbers would tie.
    ladder = torch.arange(experts, dtype=torch.float64) / 32
    inputs = {"logits": torch.stack([ladder[torch.randperm(experts)] for _ in range(rows)] or [ladder])[:rows]}

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(
            zip(("probs", "scores", "lse"), topk_routing(leaves["logits"], topk, renormalize=renormalize), strict=False)
        )

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return expression(leaves, topk, renormalize)

    with ran_on(backend, "topk_routing", *LAUNCHERS):
        actual = outputs_and_gradients(op, inputs, dtype)
    assert actual["probs"].dtype == torch.float32
    exact = outputs_and_gradients(plain, inputs, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, inputs, dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_plan_groups_every_choice_by_expert(ran_on, case: str, backend: str) -> None:
    rows, experts, topk = CASES[case]
    logits = torch.randn(rows, experts)
    with ran_on(backend, "topk_routing", "topk_routing_fwd"):
        route = topk_routing(logits, topk, renormalize=True)
    assert torch.equal(route.topk_indices, logits.topk(topk).indices)
    flat = route.topk_indices.flatten().tolist()
    assert route.plan.tolist() == sorted(range(rows * topk), key=lambda i: (flat[i], i))
    assert route.tokens_per_expert.tolist() == [flat.count(e) for e in range(experts)]
    assert route.expert_offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]
    assert torch.equal((route.probs > 0).sum(1), torch.full((rows,), topk))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ties_go_to_the_smaller_index(ran_on, backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 5.0]])
    with ran_on(backend, "topk_routing", "topk_routing_fwd"):
        route = topk_routing(logits, 2, renormalize=True)
    assert route.topk_indices.tolist() == [[1, 2], [0, 1], [3, 0]]
    assert route.probs[1].tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_distinct_logits_with_equal_scores_are_no_tie(ran_on, backend: str) -> None:
    """Both small scores underflow to zero; the larger logit is still the second choice, and gradients stay finite."""
    logits = torch.tensor([[-400.0, -300.0, 0.0]], requires_grad=True)
    with ran_on(backend, "topk_routing", *LAUNCHERS):
        route = topk_routing(logits, 2, renormalize=True)
        route.probs[0, 1].backward()
    assert route.topk_indices.tolist() == [[2, 1]]
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("output", ["probs", "scores", "lse"])
def test_gradient_of_one_output_alone(ran_on, backend: str, output: str) -> None:
    inputs = {"logits": torch.randn(4, 5, dtype=torch.float64)}
    with ran_on(backend, "topk_routing", *LAUNCHERS):
        actual = outputs_and_gradients(
            lambda leaves: {output: getattr(topk_routing(leaves["logits"], 2, renormalize=True), output)},
            inputs,
            torch.float32,
        )
    plain = [
        outputs_and_gradients(lambda leaves: {output: expression(leaves, 2, True)[output]}, inputs, dtype)
        for dtype in (torch.float64, torch.float32)
    ]
    assert_all_accurate(actual, *plain)


def test_gradcheck() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_routing(x, 3, renormalize=True)[:3], logits)


@pytest.mark.parametrize("rows", [3, 0])
def test_opcheck(rows: int) -> None:
    logits = torch.randn(rows, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.parrot.topk_routing.default, (logits, 2, True))


@pytest.mark.parametrize("topk", [0, 5])
def test_topk_out_of_range(topk: int) -> None:
    with pytest.raises(ValueError, match=rf"topk must be in \[1, num_experts=4\], got {topk}"):
        topk_routing(torch.randn(2, 4), topk, renormalize=False)
