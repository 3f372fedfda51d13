"""Switches of the router beside the released rule: balance by a bias, a schedule of its scale, entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parrot_kernels.testing import make_spans
from parrot_sys.modules.released_experts import experts_from_released, experts_to_released
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import RoutingOutput, TextGuidedMoE

HIDDEN, EXPERTS = 12, 4


def make(**settings: Any) -> TextGuidedMoE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "ffn_hidden_size": 5, "routing": "topk", "topk": 2}
    return TextGuidedMoE(TextGuidedMoEConfig(**(sizes | settings)), HIDDEN)


def run(module: TextGuidedMoE, images: int = 6) -> RoutingOutput:
    generator = torch.Generator().manual_seed(1)
    features, text = (torch.randn(*shape, generator=generator) for shape in ((images, 3, HIDDEN), (images, HIDDEN)))
    routing: RoutingOutput = module(features, text, *make_spans([1] * images, [1] * images))[1]
    return routing


def chosen(routing: RoutingOutput) -> Tensor:
    assert routing.topk_indices is not None
    return routing.topk_indices.flatten().bincount(minlength=EXPERTS).double()


def bias_of(module: TextGuidedMoE) -> Tensor:
    assert module.selection_bias is not None
    return module.selection_bias


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_bias_chooses_but_does_not_weigh(renormalize: bool) -> None:
    module = make(expert_bias=True, renormalize=renormalize)
    plain = make(renormalize=renormalize)
    torch.testing.assert_close(run(module).probs, run(plain).probs)
    bias_of(module)[3] = 5.0
    routing = run(module)
    assert routing.topk_indices is not None
    assert (routing.topk_indices == 3).any(1).all()
    scores = routing.logits.softmax(-1).gather(1, routing.topk_indices)
    wanted = scores / scores.sum(1, keepdim=True) if renormalize else scores
    torch.testing.assert_close(routing.probs.gather(1, routing.topk_indices), wanted)
    assert (routing.probs > 0).sum(1).tolist() == [2] * 6


def test_the_bias_follows_what_all_forward_passes_of_a_step_choose() -> None:
    module = make(expert_bias=True, bias_update_rate=0.25)
    counts = chosen(run(module)) + chosen(run(module, images=3))
    with torch.no_grad():
        run(module, images=5)  # a validation, or a first look at the routes
    module.finish_step(updated=True)
    wanted = 0.25 * (counts.mean() - counts).sign()
    assert bias_of(module).tolist() == wanted.tolist()
    assert wanted.unique().numel() > 1
    run(module, images=2)
    module.finish_step(updated=False)  # a step that was left out
    module.finish_step(updated=True)  # one without any image: all experts have equal parts of nothing
    assert bias_of(module).tolist() == wanted.tolist()


@pytest.mark.parametrize("reason", ["rate", "frozen"])
def test_the_bias_stays_where_it_may_not_move(reason: str) -> None:
    module = make(expert_bias=True, bias_update_rate=0.0 if reason == "rate" else 0.1)
    if reason == "frozen":
        module.requires_grad_(False)
    run(module)
    module.finish_step(updated=True)
    assert not bias_of(module).any()


def test_the_bias_evens_out_what_experts_get() -> None:
    """Routes that all prefer one expert are spread by the bias alone, without any gradient."""
    module = make(expert_bias=True, bias_update_rate=0.02, topk=1)
    with torch.no_grad():
        module.router_weight.zero_()
        module.router_weight[:, 0] = torch.tensor([1.0, 0.0, -0.5, -1.0])
    assert chosen(run(module, images=64)).max() > 32
    totals = torch.zeros(EXPERTS, dtype=torch.float64)
    for step in range(200):
        counts = chosen(run(module, images=64))
        totals += counts if step >= 100 else 0
        module.finish_step(updated=True)
    shares = totals / totals.sum()
    assert shares.min() > 0.5 / EXPERTS, shares
    assert shares.max() < 2.0 / EXPERTS, shares


def test_the_bias_is_saved_in_the_released_layout() -> None:
    module = make(expert_bias=True)
    bias_of(module).copy_(torch.tensor([0.25, -0.5, 0.0, 1.0]))
    released = experts_to_released(module.state_dict())
    assert released["gate.e_score_correction_bias"].tolist() == [0.25, -0.5, 0.0, 1.0]
    other = make(expert_bias=True)
    other.load_state_dict(experts_from_released(released))
    assert torch.equal(bias_of(other), bias_of(module))
    assert "gate.e_score_correction_bias" not in experts_to_released(make().state_dict())


def test_the_scale_goes_from_start_to_end_by_equal_factors() -> None:
    config = TextGuidedMoEConfig(router_scale=8.0, router_scale_start=0.5, router_scale_steps=4)
    assert [config.scale_at(step) for step in (0, 1, 2, 3, 4, 5, 1000)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    module = make(router_scale=8.0, router_scale_start=0.5, router_scale_steps=4)
    end = run(module).logits  # a model that is not trained has the last scale
    for step, part in ((0, 1 / 16), (3, 1 / 2), (2, 1 / 4), (9, 1.0)):
        module.start_step(step)
        torch.testing.assert_close(run(module).logits, end * part)


def test_the_entropy_loss_is_the_mean_of_the_images_own() -> None:
    module = make(routing="dense", entropy_coeff=0.5, router_scale=9.0)
    routing = run(module)
    scores = routing.logits.softmax(-1)
    wanted = 0.5 * -(scores * scores.log()).sum(1).mean()
    assert routing.aux_loss is not None
    torch.testing.assert_close(routing.aux_loss, wanted)
    assert 0 < wanted < 0.5 * math.log(EXPERTS)
    routing.aux_loss.backward()
    with torch.no_grad():
        module.router_weight -= 0.05 * module.router_weight.grad / module.router_weight.grad.norm()
    after = run(module).logits.softmax(-1)
    assert -(after * after.log()).sum(1).mean() < wanted / 0.5, "sharper"
