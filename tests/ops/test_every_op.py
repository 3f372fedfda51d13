"""What every op promises: one graph under torch.compile, activation checkpointing, opcheck.

Values are tested op by op in the other files; here the op is compared with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parrot_kernels.testing import make_spans, outputs_and_gradients
from parrot_sys import ops

OFFSETS = torch.tensor([0, 3, 3, 5], dtype=torch.int32)  # of 6 segments: an empty group, one segment of padding
PLAN = torch.tensor([3, 0, 5, 4, 1, 2])  # of 3 rows with two choices each
BOUNDARIES = torch.tensor([0, 4, 9], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 0], [3, 2]], dtype=torch.int32)
SEGMENTS = OFFSETS[[0, 0, 1, 1]], OFFSETS[[1, 3, 3, 2]]
SPANS, NO_SPANS = make_spans([4, 5], [2, 1]), make_spans([0], [3])
TARGETS = torch.tensor([2, -100, 6])
LENGTHS = {"max_seqlen_q": 5, "max_seqlen_kv": 5, "scale": 0.3}
GROUPS: dict[str, Any] = {
    "renormalize": True,
    "score_function": "sigmoid",
    "num_groups": 3,
    "topk_groups": 2,
    "expert_bias": torch.linspace(0, 1, 6),
}
EXPERTS = {"x": (3, 2, 8), "w_gate_up": (4, 2, 5, 8), "w_down": (4, 5, 8), "probs": (3, 4)}
ROUTED = {"x": (3, 2, 8), "text": (9, 8), "router_weight": (4, 8), "w_gate_up": (4, 2, 5, 8), "w_down": (4, 5, 8)}
NO_IMAGE = EXPERTS | {"x": (0, 2, 8), "probs": (0, 4)}
HEADS = {"query": (9, 2, 4), "key": (9, 1, 4), "value": (9, 1, 4)}
NO_HEADS = {name: (0, *size[1:]) for name, size in HEADS.items()}


def route(rows: int) -> ops.TopKRouting:
    return ops.topk_routing(torch.arange(rows * 4).remainder(5).view(rows, 4).float(), 2, renormalize=True)


# "function" or "function-variant": a call with everything but the differentiable tensors, and the sizes of these
CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "expert_mlp": (ops.expert_mlp, EXPERTS),
    "expert_mlp-recompute": (lambda *t: ops.expert_mlp(*t, recompute=True), EXPERTS),
    "expert_mlp-topk": (lambda *t: ops.expert_mlp(*t, plan=route(3)), EXPERTS),
    "expert_mlp-fp8": (lambda *t: ops.expert_mlp(*t, fp8=True), EXPERTS),
    "expert_mlp-no_image": (ops.expert_mlp, NO_IMAGE),
    "expert_mlp-topk_no_image": (lambda *t: ops.expert_mlp(*t, plan=route(0)), NO_IMAGE),
    "m_grouped_gemm": (lambda x, w: ops.m_grouped_gemm(x, w, OFFSETS), {"x": (6, 2, 8), "w": (3, 5, 8)}),
    "m_grouped_gemm-fp8": (lambda x, w: ops.m_grouped_gemm(x, w, OFFSETS, fp8=True), {"x": (6, 2, 8), "w": (3, 5, 8)}),
    "m_grouped_gemm-planned": (
        lambda x, w: ops.m_grouped_gemm(x, w, OFFSETS, plan=PLAN, topk=2, trans_w=False),
        {"x": (3, 8), "w": (3, 8, 5)},
    ),
    "m_grouped_swiglu": (lambda x, w: ops.m_grouped_swiglu(x, w, OFFSETS), {"x": (6, 2, 8), "w": (3, 2, 5, 8)}),
    "m_grouped_swiglu-planned": (
        lambda x, w, p: ops.m_grouped_swiglu(x, w, OFFSETS, plan=PLAN, topk=2, weights=p, recompute=True),
        {"x": (3, 8), "w": (3, 2, 5, 8), "weights": (6,)},
    ),
    "k_grouped_gemm": (lambda a, b: ops.k_grouped_gemm(a, b, OFFSETS), {"a": (6, 2, 5), "b": (6, 2, 8)}),
    "k_grouped_gemm-planned": (
        lambda a, b: ops.k_grouped_gemm(a, b, OFFSETS, plan=PLAN, topk=2),
        {"a": (6, 5), "b": (3, 8)},
    ),
    "linear_cross_entropy": (
        lambda h, w: ops.linear_cross_entropy(h, w, TARGETS),
        {"hidden": (3, 8), "weight": (7, 8)},
    ),
    "linear_cross_entropy-no_row": (
        lambda h, w: ops.linear_cross_entropy(h, w, TARGETS[:0]),
        {"hidden": (0, 8), "weight": (7, 8)},
    ),
    "linear_cross_entropy_parts": (
        lambda h, w: ops.linear_cross_entropy_parts(h, w, TARGETS, vocab_start=3),
        {"hidden": (3, 8), "weight": (7, 8)},
    ),
    "permute": (lambda x, p: ops.permute(x, PLAN, topk=2, probs=p), {"x": (3, 8), "probs": (3, 2)}),
    "permute-dropped": (lambda x: ops.permute(x, PLAN[:4], topk=2), {"x": (3, 8)}),
    "unpermute": (
        lambda rows, p: ops.unpermute(rows, PLAN, topk=2, num_rows=3, probs=p),
        {"rows": (6, 8), "probs": (3, 2)},
    ),
    "unpermute-dropped": (lambda rows: ops.unpermute(rows, PLAN[:4], topk=2, num_rows=3), {"rows": (4, 8)}),
    "router_attention": (
        lambda *t: ops.router_attention(*t, BOUNDARIES, BOUNDARIES, **LENGTHS),
        {**HEADS, "columns": (5, 2)},
    ),
    "router_attention-no_row": (
        lambda *t: ops.router_attention(*t, BOUNDARIES[:1], BOUNDARIES[:1], **LENGTHS),
        {**NO_HEADS, "columns": (5, 2)},
    ),
    "router_attention_parts": (
        lambda *t: ops.router_attention_parts(*t, BOUNDARIES, BOUNDARIES, positions=POSITIONS, **LENGTHS),
        {**HEADS, "columns": (8, 2)},
    ),
    "segment_attention": (lambda *t: ops.segment_attention(*t, *SEGMENTS, scale=0.3), {**HEADS, "query": (4, 2, 4)}),
    "segment_attention-no_row": (
        lambda *t: ops.segment_attention(*t, OFFSETS[:0], OFFSETS[:0], scale=0.3),
        {**HEADS, "query": (0, 2, 4)},
    ),
    "swiglu": (ops.swiglu, {"z": (3, 2, 2, 4), "weights": (3,)}),
    "swiglu-rows": (ops.swiglu, {"z": (3, 2, 4)}),
    "text_guided_routing": (
        lambda query, text, weight: ops.text_guided_routing(query, text, *SPANS, weight, scale=0.3),
        {"query": (3, 8), "text": (9, 8), "router_weight": (4, 8)},
    ),
    "text_guided_routing-no_text": (
        lambda query, text, weight: ops.text_guided_routing(query, text, *NO_SPANS, weight, scale=0.3),
        {"query": (3, 8), "text": (0, 8), "router_weight": (4, 8)},
    ),
    "text_guided_experts": (
        lambda x, *t: ops.text_guided_experts(x, t[0], *SPANS, *t[1:], scale=0.3),
        ROUTED,
    ),
    "text_guided_experts-topk": (
        lambda x, *t: ops.text_guided_experts(x, t[0], *SPANS, *t[1:], scale=0.3, topk=2, renormalize=True),
        ROUTED,
    ),
    "text_guided_experts-query": (
        lambda x, *t: ops.text_guided_experts(
            x, t[0], *SPANS, *t[1:4], scale=0.3, query=t[4], residual_scale=0.1, recompute=True
        ),
        ROUTED | {"query": (3, 8)},
    ),
    "text_guided_experts-no_image": (
        lambda x, *t: ops.text_guided_experts(x, t[0], *(s[:0] for s in SPANS), *t[1:], scale=0.3, topk=2),
        ROUTED | {"x": (0, 2, 8)},
    ),
    "topk_routing": (lambda logits: ops.topk_routing(logits, 2, renormalize=True), {"logits": (7, 6)}),
    "topk_routing-no_row": (lambda logits: ops.topk_routing(logits, 2, renormalize=False), {"logits": (0, 6)}),
    "topk_routing-groups": (lambda logits: ops.topk_routing(logits, 2, **GROUPS), {"logits": (7, 6)}),
}

CACHE = torch.arange(2 * 2 * 4 * 4).remainder(7).view(2, 2, 4, 4).float()
REQUESTS = (torch.tensor([[1, 0], [0, 0]], dtype=torch.int32), *torch.tensor([[0, 2, 5], [5, 3, 0]]).int())
# As CALLS, of ops for inference, which have no gradients.
INFERENCE_CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "few_rows_linear": (
        lambda x, w, n, b, r: (ops.few_rows_linear(x, w, norm=n, bias=b, residual=r, eps=1e-6),),
        {"x": (3, 8), "weight": (5, 8), "norm": (8,), "bias": (5,), "residual": (3, 5)},
    ),
    "few_rows_linear-gated": (
        lambda x, w: (ops.few_rows_linear(x, w, gated=True),),
        {"x": (0, 16), "weight": (5, 8)},
    ),
    "paged_attention": (
        lambda query: ops.paged_attention(
            query, CACHE, CACHE, *REQUESTS[:2], REQUESTS[2][:2], max_seqlen_q=3, scale=0.3
        ),
        {"query": (5, 4, 4)},
    ),
    "paged_attention-columns": (
        lambda query, columns: ops.paged_attention(
            query,
            CACHE,
            CACHE,
            *REQUESTS[:2],
            REQUESTS[2][:2],
            max_seqlen_q=3,
            scale=0.3,
            columns=columns,
            visible=CACHE[:, 0, 0] > 1,
        ),
        {"query": (5, 4, 4), "columns": (5, 2)},
    ),
}


def load(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Tensor]]:
    """A function that gives the outputs with a gradient, and random tensors for it."""
    call, sizes = CALLS[name]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = call(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(out for out in outputs if out is not None and out.requires_grad)

    return function, {leaf: torch.randn(size) for leaf, size in sizes.items()}


def results(function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    def outputs(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return {str(i): out for i, out in enumerate(function(*leaves.values()))}

    return outputs_and_gradients(outputs, inputs, torch.float32)


class Recorder(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "parrot":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_and_checkpointed(name: str) -> None:
    function, inputs = load(name)
    wanted = results(function, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)):
        own = results(other, inputs)
        assert own.keys() == wanted.keys()
        for key, value in own.items():
            assert torch.equal(value, wanted[key]), key


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    """Operators of the backward pass too: compiled graphs hold them."""
    with Recorder() as recorder:
        results(*load(name))
    assert any(operator.name().endswith("_bwd") for operator, _ in recorder.calls)
    for operator, args in recorder.calls:
        once = not operator.name().endswith("_bwd")  # gradients of gradients are not there
        args = tuple(a.detach().requires_grad_(once and a.requires_grad) if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", INFERENCE_CALLS)
def test_ops_for_inference(name: str) -> None:
    """One graph, the same results in it, opcheck, and an error instead of a gradient."""
    call, sizes = INFERENCE_CALLS[name]
    tensors = [torch.randn(size) for size in sizes.values()]
    with Recorder() as recorder:
        wanted = call(*tensors)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for value, own in zip(wanted, compiled(*tensors), strict=True):
        assert value is own is None or torch.equal(value, own)
    for operator, args in recorder.calls:
        torch.library.opcheck(operator, args)
    out, *_ = call(tensors[0].requires_grad_(), *tensors[1:])
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


def test_every_public_function_is_called() -> None:
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)} - {"force_backend"}
    assert {name.partition("-")[0] for name in (*CALLS, *INFERENCE_CALLS)} == functions
