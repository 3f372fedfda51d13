"""topk_routing: weights, statistics and gradients against plain float64; indices, counts and plan exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_sys.ops import TopKRouting, topk_routing

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


BACKENDS = ["reference", "cpu", "triton"]

# options of the router, by name; bias stands for random numbers
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"renormalize": False},
    "renormalized": {"renormalize": True},
    "sigmoid": {"renormalize": True, "score_function": "sigmoid", "scaling_factor": 2.5},
    "bias": {"renormalize": False, "score_function": "sigmoid", "expert_bias": True},
    "softmax_bias": {"renormalize": True, "expert_bias": True},
    "deepseek_v3": {
        "renormalize": True,
        "score_function": "sigmoid",
        "scaling_factor": 2.5,
        "num_groups": 4,
        "topk_groups": 2,
        "expert_bias": True,
    },
    "deepseek_v2": {"renormalize": False, "scaling_factor": 16.0, "num_groups": 3, "topk_groups": 2},
    "megatron_post_softmax": {"renormalize": True, "num_groups": 6, "topk_groups": 3},
    "every_group": {"renormalize": False, "num_groups": 4, "topk_groups": 4},
}


def make_logits(rows: int, experts: int) -> Tensor:
    """A shuffled ladder of at most 512 steps: distinct in bfloat16 up to 256, where random numbers would tie."""
    ladder = (torch.arange(experts, dtype=torch.float64) - experts // 2) / 32
    return torch.stack([ladder[torch.randperm(experts)] for _ in range(rows)] or [ladder])[:rows]


def make_options(router: str, experts: int, device: torch.device) -> dict[str, Any]:
    options = dict(ROUTERS[router])
    if options.get("expert_bias"):
        options["expert_bias"] = torch.randn(experts, device=device)
    return options


def chosen_experts(logits: Tensor, topk: int, options: dict[str, Any]) -> Tensor:
    """Indices, as Megatron-Core's `topk_routing_with_score_function` finds them, with torch.topk."""
    scores = logits.sigmoid() if options.get("score_function") == "sigmoid" else logits.softmax(-1)
    bias = options.get("expert_bias")
    values = logits if bias is None else scores + bias.double()
    groups, topk_groups = options.get("num_groups", 1), options.get("topk_groups", 1)
    if groups > 1:
        after = options["renormalize"] and "score_function" not in options
        by_group = (values if bias is not None or after else scores).unflatten(1, (groups, -1))
        best = by_group.topk(max(1, topk // topk_groups)).values.sum(-1).topk(topk_groups).indices
        outside = torch.ones(len(logits), groups, 1, dtype=torch.bool, device=logits.device)
        outside = outside.scatter(1, best[:, :, None], False).expand(by_group.shape).flatten(1)
        values = values.masked_fill(outside, float("-inf"))
    return values.topk(topk).indices


def expression(logits: Tensor, indices: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """The differentiable outputs in plain PyTorch, given what was chosen."""
    sigmoid = options.get("score_function") == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    probs = scores * torch.zeros_like(scores).scatter(1, indices, 1.0)
    if options["renormalize"]:
        probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
    lse = logits.logsumexp(-1)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20) if sigmoid else scores
    probs = probs * options.get("scaling_factor", 1.0)
    return {"probs": probs, "scores": scores, "lse": lse, "score_sums": shares.sum(0), "z_sum": lse.square().sum()}


def compare_with_float64(
    ran_on, backend: str, logits: Tensor, topk: int, options: dict[str, Any], dtype: torch.dtype
) -> TopKRouting:
    """Floats and the gradient by the tolerance rule, integers exactly; returns the route."""
    routes: list[TopKRouting] = []

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        routes.append(topk_routing(leaves["logits"], topk, **options))
        return {name: getattr(routes[0], name) for name in ("probs", "scores", "lse", "score_sums", "z_sum")}

    with ran_on(backend, "topk_routing", *LAUNCHERS):
        actual = outputs_and_gradients(op, {"logits": logits}, dtype)
    (route,) = routes
    assert actual["probs"].dtype == torch.float32
    assert torch.equal(route.topk_indices, chosen_experts(logits.to(dtype).double(), topk, options))
    check_plan(route, topk)

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return expression(leaves["logits"], route.topk_indices, options)

    exact = outputs_and_gradients(plain, {"logits": logits.to(dtype).double()}, torch.float64)
    assert_all_accurate(actual, exact, outputs_and_gradients(plain, {"logits": logits}, dtype))
    return route


def check_plan(route: TopKRouting, topk: int) -> None:
    flat = route.topk_indices.flatten().tolist()
    experts = route.tokens_per_expert.numel()
    assert all(len(set(row)) == topk for row in route.topk_indices.tolist())
    assert route.plan.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert route.tokens_per_expert.tolist() == [flat.count(e) for e in range(experts)]
    assert route.expert_offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, device_of, case: str, backend: str, dtype: torch.dtype) -> None:
    rows, experts, topk = CASES[case]
    logits = make_logits(rows, experts).to(device_of(backend))
    for router in ("softmax", "renormalized"):
        compare_with_float64(ran_on, backend, logits, topk, make_options(router, experts, logits.device), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_match_float64(ran_on, device_of, router: str, backend: str, dtype: torch.dtype) -> None:
    logits = make_logits(19, 24).to(device_of(backend))
    compare_with_float64(ran_on, backend, logits, 6, make_options(router, 24, logits.device), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_smaller_index(ran_on, device_of, backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -0.0], [3.0, 1.0, 3.0, 5.0]])
    with ran_on(backend, "topk_routing", "topk_routing_fwd"):
        route = topk_routing(logits.to(device_of(backend)), 2, renormalize=True)
    assert route.topk_indices.tolist() == [[1, 2], [0, 1], [3, 0]]
    assert route.probs[1].tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_groups_go_to_the_first(ran_on, device_of, backend: str) -> None:
    """Two groups sum to the same; the third group's best expert is better than any of theirs."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.5, -9.0]], device=device_of(backend))
    with ran_on(backend, "topk_routing", "topk_routing_fwd"):
        route = topk_routing(logits, 2, renormalize=True, num_groups=3, topk_groups=1)
    assert route.topk_indices.tolist() == [[1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_counts_as_the_largest(ran_on, device_of, backend: str) -> None:
    logits = torch.tensor([[1.0, float("nan"), float("inf"), -float("nan")]], device=device_of(backend))
    with ran_on(backend, "topk_routing", "topk_routing_fwd"):
        assert topk_routing(logits, 3, renormalize=False).topk_indices.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_distinct_logits_with_equal_scores_are_no_tie(ran_on, device_of, backend: str) -> None:
    """Both small scores underflow to zero; the larger logit is still the second choice, and gradients stay finite."""
    logits = torch.tensor([[-400.0, -300.0, 0.0]], device=device_of(backend), requires_grad=True)
    with ran_on(backend, "topk_routing", *LAUNCHERS):
        route = topk_routing(logits, 2, renormalize=True)
        route.probs[0, 1].backward()
    assert route.topk_indices.tolist() == [[2, 1]]
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["probs", "scores", "lse", "score_sums", "z_sum"])
@pytest.mark.parametrize("router", ["renormalized", "sigmoid"])
def test_gradient_of_one_output_alone(ran_on, device_of, backend: str, output: str, router: str) -> None:
    inputs = {"logits": torch.randn(4, 5, dtype=torch.float64).to(device_of(backend))}
    options = ROUTERS[router]
    with ran_on(backend, "topk_routing", *LAUNCHERS):
        actual = outputs_and_gradients(
            lambda leaves: {output: getattr(topk_routing(leaves["logits"], 2, **options), output)},
            inputs,
            torch.float32,
        )

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {output: expression(leaves["logits"], leaves["logits"].topk(2).indices, options)[output]}

    inputs["logits"] = inputs["logits"].float().double()
    assert_all_accurate(actual, *(outputs_and_gradients(plain, inputs, d) for d in (torch.float64, torch.float32)))


@pytest.mark.parametrize("router", ["renormalized", "sigmoid"])
def test_gradcheck(router: str) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: topk_routing(x, 3, **ROUTERS[router])[:5], logits)


@pytest.mark.parametrize("topk", [0, 5])
def test_topk_out_of_range(topk: int) -> None:
    with pytest.raises(ValueError, match=rf"topk must be in \[1, num_experts=4\], got {topk}"):
        topk_routing(torch.randn(2, 4), topk, renormalize=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, r"num_groups must divide num_experts=4, got 3"),
        ({"num_groups": 2, "topk_groups": 3}, r"topk_groups must be in \[1, num_groups=2\], got 3"),
        ({"num_groups": 2, "topk_groups": 1}, r"topk must be in \[1, experts of 1 groups=2\], got 3"),
        ({"score_function": "relu"}, r"score_function must be 'softmax' or 'sigmoid', got 'relu'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_routing(torch.randn(2, 4), 3, renormalize=False, **options)
