"""text_guided_experts: the same as text_guided_routing, topk_routing and expert_mlp one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_sys import ops

SCALE, RESIDUAL, OUTPUT = 0.3, 0.1, 1.5


def make_leaves(images: int, rows: int, experts: int, own_query: bool) -> dict[str, Tensor]:
    hidden, ffn = 8, 6
    sizes = {
        "x": (images, rows, hidden),
        "text": (5 * images, hidden),
        "router_weight": (experts, hidden),
        "w_gate_up": (experts, 2, ffn, hidden),
        "w_down": (experts, ffn, hidden),
    }
    sizes |= {"query": (images, hidden)} if own_query else {}
    return {name: torch.randn(size) for name, size in sizes.items()}


def make_spans(images: int) -> tuple[Tensor, Tensor]:
    """The last image has no text of its own."""
    start = torch.arange(images, dtype=torch.int32) * 5
    return start, torch.where(start < 5 * (images - 1), start + 5, start)


def fused(leaves: dict[str, Tensor], spans: tuple[Tensor, Tensor], topk: int | None) -> tuple[Tensor, ...]:
    x, text, router, gate_up, down, *query = leaves.values()
    y, logits, probs, _ = ops.text_guided_experts(
        x, text, *spans, router, gate_up, down, scale=SCALE, query=query[0] if query else None, topk=topk,
        renormalize=topk is not None, residual_scale=RESIDUAL, output_scale=OUTPUT,
    )  # fmt: skip
    return y, logits, probs


def three_ops(leaves: dict[str, Tensor], spans: tuple[Tensor, Tensor], topk: int | None) -> tuple[Tensor, ...]:
    x, text, router, gate_up, down, *query = leaves.values()
    logits, _ = ops.text_guided_routing(query[0] if query else x[:, 0], text, *spans, router, scale=SCALE)
    route = ops.topk_routing(logits, topk or len(router), renormalize=topk is not None)
    plan = route if topk else None
    y = ops.expert_mlp(x, gate_up, down, route.probs, plan=plan, residual_scale=RESIDUAL, output_scale=OUTPUT)
    return y, logits, route.probs


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(0, 4),
    rows=st.integers(1, 5),
    topk=st.none() | st.integers(1, 3),
    own_query=st.booleans(),
    frozen=st.sets(st.sampled_from(["x", "text", "router_weight", "w_gate_up", "w_down"]), max_size=4),
    used=st.sets(st.integers(0, 2), min_size=1),
)
def test_equals_three_ops(
    images: int, rows: int, topk: int | None, own_query: bool, frozen: set[str], used: set[int]
) -> None:
    """Values, and gradients through any of the outputs, with any of the inputs frozen."""
    torch.manual_seed(images * 5 + rows)
    leaves = make_leaves(images, rows, 3, own_query)
    spans = make_spans(images)
    factors = [torch.randn(images, rows, 8), torch.randn(images, 3), torch.randn(images, 3)]
    results = []
    for function in (fused, three_ops):
        own = {name: leaf.clone().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
        outputs = function(own, spans, topk)
        loss = sum((outputs[i] * factors[i]).sum() for i in used)
        grads: dict[str, Tensor | None] = dict.fromkeys(own)
        if loss.requires_grad:
            loss.backward()
            grads = {name: leaf.grad for name, leaf in own.items()}
        results.append((outputs, grads))
    (outputs, grads), (wanted_outputs, wanted_grads) = results
    torch.testing.assert_close(outputs, wanted_outputs)
    for name, wanted in wanted_grads.items():
        grad = grads[name]
        if wanted is None:
            assert grad is None or not grad.any(), name
        else:
            torch.testing.assert_close(torch.zeros_like(wanted) if grad is None else grad, wanted, rtol=1e-4, atol=1e-5)


def test_chosen_experts_are_given() -> None:
    leaves, spans = make_leaves(3, 2, 4, own_query=False), make_spans(3)
    _, logits, probs, indices = ops.text_guided_experts(
        *list(leaves.values())[:2], *spans, *list(leaves.values())[2:], scale=SCALE, topk=2
    )
    assert torch.equal(indices[:2], logits.topk(2).indices[:2])
    assert indices[2].tolist() == [0, 1]  # without text all are alike, and the first ones are taken
    assert torch.equal(probs.gather(1, indices) > 0, torch.ones(3, 2, dtype=torch.bool))
    assert (probs > 0).sum() == 6


def test_number_of_experts_out_of_range() -> None:
    leaves, spans = make_leaves(1, 2, 4, own_query=False), make_spans(1)
    x, text, *weights = leaves.values()
    for topk in (0, 5):
        with pytest.raises(ValueError, match=r"topk must be in \[1, num_experts=4\]"):
            ops.text_guided_experts(x, text, *spans, *weights, scale=SCALE, topk=topk)
