"""The CUDA text_guided_routing: on a GPU if there is one, else its sources compiled for the CPU (tests/cuda_emulator).

Values and gradients against the formula in float64, sample by sample.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import assert_all_accurate, make_spans, outputs_and_gradients
from parrot_kernels.text_guided_routing import cuda_impl
from parrot_sys.ops import text_guided_routing
from tests import cuda_emulator

LAUNCHERS = ("text_guided_routing_fwd", "text_guided_routing_bwd")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# spans (start, end) of each image, text rows, hidden, experts
CASES = {
    "shared": ([(0, 17), (0, 17), (17, 37)], 37, 72, 6),  # rows that end within a chunk, H that ends within a step
    "overlapping": ([(0, 9), (3, 20), (2, 4), (19, 20)], 20, 64, 6),
    "empty_span": ([(0, 6), (6, 6), (6, 11)], 11, 16, 6),
    "many_images": ([(i, i + 9) for i in range(40)], 48, 8, 3),  # more than one pass over a chunk, and two votes
    "many_experts": ([(0, 13), (13, 18)], 18, 24, 20),
    "most_experts": ([(0, 5)], 5, 8, 64),
    "one_row": ([(0, 1)], 1, 8, 1),
    "unread_rows": ([(30, 33)], 50, 16, 6),  # text that no image looks at gets zero gradients
    "wide": ([(0, 11), (9, 18)], 18, 2056, 6),  # H that reaches all warps of a cluster
    "no_text": ([(0, 0), (0, 0)], 0, 8, 3),
    "no_image": ([], 9, 8, 3),
}


def make_inputs(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    spans, rows, hidden, experts = CASES[case]
    inputs = {
        "query": torch.randn(len(spans), hidden, dtype=torch.float64),
        "text": torch.randn(rows, hidden, dtype=torch.float64),
        "router_weight": torch.randn(experts, hidden, dtype=torch.float64) * hidden**-0.5,
    }
    start, end = torch.tensor(spans, dtype=torch.int32).reshape(-1, 2).unbind(1)
    return {name: value.to(dtype).double() for name, value in inputs.items()}, start.contiguous(), end.contiguous()


def expression(tensors: dict[str, Tensor], start: Tensor, end: Tensor, scale: float) -> dict[str, Tensor]:
    """The formula, image by image, in the dtype of the inputs."""
    nothing = sum(tensor.sum() for tensor in tensors.values()) * 0  # so that all gradients exist
    logits, lses = [], []
    for query, first, last in zip(tensors["query"], start.tolist(), end.tolist(), strict=True):
        span = tensors["text"][first:last]
        scores = span @ query * scale
        logits.append(tensors["router_weight"] @ (scores.softmax(0) @ span) + nothing)
        lses.append(scores.logsumexp(0) + nothing)
    if not logits:
        return {"logits": nothing * start.new_zeros(0, len(tensors["router_weight"])), "lse": nothing * start}
    return {"logits": torch.stack(logits), "lse": torch.stack(lses)}


def run(case: str, dtype: torch.dtype, device: torch.device) -> list[dict[str, Tensor]]:
    """Outputs and gradients of the op, of float64, and of PyTorch in `dtype`."""
    inputs, start, end = make_inputs(case, dtype)
    scale = 1 / math.sqrt(inputs["query"].shape[1])

    def op(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        query, text, weight = (leaf.to(device) for leaf in leaves.values())
        logits, lse = text_guided_routing(query, text, start.to(device), end.to(device), weight, scale=scale)
        return {"logits": logits.cpu(), "lse": lse.cpu()}

    def plain(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return expression(leaves, start, end, scale)

    exact = outputs_and_gradients(plain, inputs, torch.float64)
    return [outputs_and_gradients(op, inputs, dtype), exact, outputs_and_gradients(plain, inputs, dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(ran_on, cuda_device: torch.device, case: str, dtype: torch.dtype) -> None:
    with ran_on("cuda", "text_guided_routing", *LAUNCHERS):
        assert_all_accurate(*run(case, dtype, cuda_device))


@pytest.mark.parametrize("case", ["shared", "overlapping", "many_images"])
def test_neither_order_of_threads_nor_number_of_blocks_changes_a_bit(
    ran_on, cuda_device: torch.device, case: str
) -> None:
    """On a GPU two runs must agree. The emulator shuffles threads, which shows a missing barrier, and runs the blocks
    one after the other in an order that the seed shuffles: one that waits for another would never end.
    """
    results = []
    with ran_on("cuda", "text_guided_routing", *LAUNCHERS):
        for seed, multiprocessors in ((0, 1), (1, 1), (2, 8), (3, 8)):
            torch.manual_seed(0)
            with cuda_emulator.device(seed=seed, multiprocessors=multiprocessors):
                results.append(run(case, torch.bfloat16, cuda_device)[0])
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


def test_the_blocks_of_a_cluster_share_the_columns_of_a_short_text(ran_on, cuda_device: torch.device) -> None:
    """A short text gives one block a chunk too little to do: four add up what each has of H, in a fixed order."""
    inputs, start, end = make_inputs("wide", torch.float32)
    query, text, weight = (value.float().to(cuda_device) for value in inputs.values())
    spans, scale = (start.to(cuda_device), end.to(cuda_device)), 1 / math.sqrt(2056)

    def lse(seed: int, multiprocessors: int) -> Tensor:
        with cuda_emulator.device(seed=seed, multiprocessors=multiprocessors):
            return text_guided_routing(query, text, *spans, weight, scale=scale)[1]

    with ran_on("cuda", "text_guided_routing", "text_guided_routing_fwd"):
        shared = [lse(seed, 4) for seed in range(3)]  # two chunks of rows, eight blocks at the most
        alone = lse(0, 3)
    assert all(torch.equal(shared[0], other) for other in shared)
    if cuda_device.type == "cpu":  # a GPU has room for the cluster in both
        assert not torch.equal(shared[0], alone)
    torch.testing.assert_close(shared[0], alone, rtol=1e-5, atol=0)


def test_counters_are_left_at_zero(ran_on, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used again by the next launch in the stream, without being cleared."""
    counters = torch.zeros(64, dtype=torch.int32, device=cuda_device)
    monkeypatch.setattr(cuda_impl, "semaphores", lambda count, device: counters)
    results = []
    with ran_on("cuda", "text_guided_routing", *LAUNCHERS):
        for _ in range(2):
            torch.manual_seed(0)
            results.append(run("overlapping", torch.bfloat16, cuda_device)[0])
            assert not counters.any()
    for name, value in results[1].items():
        assert torch.equal(value, results[0][name]), name


def test_spans_outside_of_the_text_are_cut(ran_on, cuda_device: torch.device) -> None:
    """The device cannot raise; it must not read there either."""
    inputs, *_ = make_inputs("shared", torch.float32)
    query, text, weight = (value.float().to(cuda_device) for value in inputs.values())
    with ran_on("cuda", "text_guided_routing", "text_guided_routing_fwd"):
        spans = torch.tensor([-5, 3, 40]), torch.tensor([10, 10**12, 50])
        wild = text_guided_routing(query, text, *(span.to(cuda_device) for span in spans), weight, scale=0.3)
        spans = torch.tensor([0, 3, 37]), torch.tensor([10, 37, 37])
        cut = text_guided_routing(query, text, *(span.to(cuda_device) for span in spans), weight, scale=0.3)
    assert torch.equal(wild[0], cut[0])
    assert torch.equal(wild[1], cut[1])


@pytest.mark.parametrize("frozen", ["query", "text", "router_weight"])
def test_frozen_inputs_change_no_other_gradient(ran_on, cuda_device: torch.device, frozen: str) -> None:
    inputs, start, end = make_inputs("overlapping", torch.bfloat16)
    grads = []
    for freeze in (None, frozen):
        leaves = [
            value.to(cuda_device, torch.bfloat16).requires_grad_(name != freeze) for name, value in inputs.items()
        ]
        query, text, weight = leaves
        with ran_on("cuda", "text_guided_routing", *LAUNCHERS):
            spans = start.to(cuda_device), end.to(cuda_device)
            logits, _ = text_guided_routing(query, text, *spans, weight, scale=0.3)
            logits.square().sum().backward()
        grads.append(dict(zip(inputs, (leaf.grad for leaf in leaves), strict=True)))
    assert grads[1].pop(frozen) is None
    for name, grad in grads[1].items():
        assert torch.equal(grad, grads[0][name]), name


def test_query_may_be_a_strided_view(ran_on, cuda_device: torch.device) -> None:
    """The module passes features[:, 0]; a view whose rows do not start at 16-byte boundaries is copied."""
    inputs, start, end = make_inputs("shared", torch.bfloat16)
    query, text, weight = (value.to(cuda_device, torch.bfloat16) for value in inputs.values())
    args = text, start.to(cuda_device), end.to(cuda_device), weight
    with ran_on("cuda", "text_guided_routing", "text_guided_routing_fwd"):
        dense, _ = text_guided_routing(query, *args, scale=0.3)
        for width in (72 * 5, 72 + 3):
            features = torch.full((3, width), float("nan"), dtype=torch.bfloat16, device=cuda_device)
            features[:, :72] = query
            strided, _ = text_guided_routing(features[:, :72], *args, scale=0.3)
            assert torch.equal(strided, dense)


def test_reasons_for_a_refusal(cuda_device: torch.device) -> None:
    def reason(images: int = 2, rows: int = 8, hidden: int = 16, experts: int = 6, dtype=torch.bfloat16) -> str | None:
        query, text, weight = (
            torch.empty(size, hidden, dtype=dtype, device=cuda_device) for size in (images, rows, experts)
        )
        return cuda_impl.why_not(query, text, *make_spans([rows], [images]), weight, 0.1)

    assert reason() is None
    assert reason(experts=65) == "it takes at most 64 experts, got 65"
    assert reason(hidden=12) == "hidden_size must be a multiple of 8 for bfloat16, got 12"
    assert reason(hidden=12, dtype=torch.float32) is None
    assert reason(images=2**15, rows=2**14, hidden=0) == (
        "it keeps a score for each image and text row, at most 268435456, got 536870912"
    )


def test_host_checks_name_what_is_wrong(cuda_device: torch.device) -> None:
    """What `why_not` does not see: operands that do not belong together."""
    fwd = torch.ops.parrot_ext.text_guided_routing_cuda_fwd
    query, text, weight = (torch.zeros(n, 8, device=cuda_device) for n in (2, 5, 3))
    start, end = (span.to(cuda_device) for span in make_spans([5], [2]))
    counters = torch.zeros(2, dtype=torch.int32, device=cuda_device)
    with pytest.raises(RuntimeError, match="arrived must have one element an image, at least 2, got 1"):
        fwd(query, text, start, end, weight, counters[:1], 0.3)
    wrong = [
        ((query, text[:, :4], start, end, weight), r"text must have shape \[any, 8\], got \[5, 4\]"),
        ((query, text, start[:1], end, weight), r"text_start must have shape \[2\], got \[1\]"),
        ((query, text, start, end.long(), weight), "text_end must have the dtype of text_start"),
        ((query, text, start.float(), end, weight), "text_start must be int32 or int64, got Float"),
        ((query, text.half(), start, end, weight), "text must have the dtype of query, Float, got Half"),
        ((query, text, start, end, weight.half()), "router_weight must have the dtype of query"),
        ((query.flatten()[1:9].reshape(1, 8), text, start[:1], end[:1], weight), "query must start at a multiple"),
        ((query, text, start, end, torch.zeros(65, 8, device=cuda_device)), r"experts must be in \[1, 64\], got 65"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            fwd(*args, counters, 0.3)
