"""The CUDA topk_routing: on a GPU if there is one, else its sources compiled for the CPU (tests/cuda_emulator).

Integers must be those of the reference; floats and gradients are held against the reference in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, outputs_and_gradients
from parrot_kernels.topk_routing import cuda_impl, reference
from parrot_sys.ops import force_backend, topk_routing
from tests import cuda_emulator

LAUNCHERS = ("topk_routing_fwd", "topk_routing_bwd")
FLOATS = ("probs", "scores", "lse", "score_sums", "z_sum")

# rows, experts, K, options
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "images": (5, 6, 2, {"renormalize": True}),
    "all_chosen": (4, 5, 5, {"renormalize": False, "scaling_factor": 2.5}),
    "one": (1, 1, 1, {"renormalize": True}),
    "no_row": (0, 6, 2, {"renormalize": True}),
    "tiles": (600, 6, 2, {"renormalize": True}),  # three launches, the last tile short
    "tile": (256, 3, 1, {"renormalize": False}),  # as many rows as one launch takes
    "many_choices": (3, 70, 40, {"renormalize": True}),  # more choices than lanes
    "wide": (3, 200, 8, {"renormalize": False, "score_function": "sigmoid"}),
    "widest": (2, 512, 16, {"renormalize": True}),
    "groups": (7, 40, 6, {"renormalize": False, "num_groups": 4, "topk_groups": 2}),
    "groups_by_logit": (7, 40, 6, {"renormalize": True, "num_groups": 8, "topk_groups": 3}),
    "deepseek": (
        300,
        24,
        4,
        {"renormalize": True, "score_function": "sigmoid", "scaling_factor": 2.5, "num_groups": 4, "topk_groups": 2},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, cuda_device: torch.device, case: str, dtype: torch.dtype) -> None:
    rows, experts, topk, options = CASES[case]
    inputs = {"logits": torch.randn(rows, experts).to(dtype).double()}
    bias = torch.randn(experts) / 4 if case == "deepseek" else None
    integers: dict[str, Tensor] = {}

    def op(leaves: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        own_bias = None if bias is None else bias.to(device)
        route = topk_routing(leaves["logits"].to(device), topk, expert_bias=own_bias, **options)._asdict()
        outputs = {name: route.pop(name).cpu() for name in FLOATS}
        for name, value in route.items():
            assert torch.equal(value.cpu(), integers.setdefault(name, value.cpu())), name
        return outputs

    cpu = torch.device("cpu")
    with force_backend("reference"):
        exact = outputs_and_gradients(lambda leaves: op(leaves, cpu), inputs, torch.float64)
        same = outputs_and_gradients(lambda leaves: op(leaves, cpu), inputs, dtype)
    with ran_on("cuda", "topk_routing", *LAUNCHERS):
        actual = outputs_and_gradients(lambda leaves: op(leaves, cuda_device), inputs, dtype)
    assert_all_accurate(actual, exact, same)


def test_ties_and_values_that_are_no_numbers(cuda_device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0.0, -0.0, 0.0, -1.0], [nan, 1.0, nan, 2.0], [-inf, 3.0, -inf, -inf], [inf, 1.0, inf, 0.0], [-inf] * 4]
    logits = torch.tensor(rows, device=cuda_device)
    actual = cuda_impl.topk_routing_fwd(logits, 3, False)
    wanted = reference.topk_routing_fwd(logits, 3, False)
    for own, other in zip(actual[5:], wanted[5:], strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(actual[:3], wanted[:3], equal_nan=True)


@pytest.mark.parametrize("case", ["tiles", "deepseek"])
def test_neither_order_of_threads_nor_chance_changes_a_bit(cuda_device: torch.device, case: str) -> None:
    rows, experts, topk, options = CASES[case]
    logits = torch.randn(rows, experts, device=cuda_device)
    results = []
    for seed in (0, 1):
        with cuda_emulator.device(seed=seed):
            results.append(cuda_impl.topk_routing_fwd(logits, topk, **options))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ragged_shapes(cuda_device: torch.device, data: st.DataObject) -> None:
    """Any rows, experts, groups and ties; the reference gives the integers."""
    num_groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    topk_groups = data.draw(st.integers(1, num_groups))
    topk = data.draw(st.integers(1, min(16, topk_groups * size)))
    rows = data.draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(-4, 4, (rows, num_groups * size), generator=generator).float().to(cuda_device)
    # Renormalised softmax orders groups by sums of whole numbers, which are exact: equal groups are equal everywhere.
    args = logits, topk, True, "softmax", 1.5, num_groups, topk_groups
    for own, other in zip(cuda_impl.topk_routing_fwd(*args)[5:], reference.topk_routing_fwd(*args)[5:], strict=True):
        assert torch.equal(own, other)


def test_reasons_for_a_refusal(cuda_device: torch.device) -> None:
    def reason(rows: int, experts: int, topk: int, *options: object) -> str | None:
        return cuda_impl.why_not(torch.empty(rows, experts, device=cuda_device), topk, *options)

    assert reason(2, 512, 16, True, "softmax", 1.0, 32, 4, None) is None
    assert reason(2, 513, 2, True) == "it takes at most 512 experts, got 513"
    assert reason(2, 66, 2, True, "softmax", 1.0, 33, 4, None) == "it takes at most 32 groups of experts, got 33"
    huge = torch.empty(1, 1, device="meta").expand(2**28, 8)
    assert cuda_impl.why_not(huge, 8, True) == "it counts fewer than 2^31 choices, got 2147483648"


def test_host_checks_name_what_is_wrong(cuda_device: torch.device) -> None:
    fwd = torch.ops.parrot_ext.topk_routing_cuda_fwd
    logits, options = torch.zeros(2, 6, device=cuda_device), (True, False, 1.0)
    with pytest.raises(RuntimeError, match=r"topk must be in \[1, num_experts=6\], got 7"):
        fwd(logits, 7, *options, 1, 1, None)
    with pytest.raises(RuntimeError, match=r"num_groups must be in \[1, 32\] and divide num_experts=6, got 4"):
        fwd(logits, 2, *options, 4, 1, None)
    with pytest.raises(RuntimeError, match="topk must be at most the experts of 1 groups, 2, got 3"):
        fwd(logits, 3, *options, 3, 1, None)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[6\], got \[5\]"):
        fwd(logits, 2, *options, 1, 1, torch.zeros(5, device=cuda_device))
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16, got Double"):
        fwd(logits.double(), 2, *options, 1, 1, None)
