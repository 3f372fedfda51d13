"""TextGuidedMoE against the released rules, sample by sample and expert by expert, and recorded outputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from parrot_kernels.testing import make_spans
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.modules.released_experts import (
    experts_from_released,
    experts_to_released,
    pack_released,
    released_keys,
    unpack_released,
)
from parrot_sys.modules.routing_config import TextGuidedMoEConfig
from parrot_sys.modules.text_guided_moe import RoutingOverride, TextGuidedMoE
from tests.comparisons import differ

FIXTURE = Path(__file__).parent.parent / "fixtures" / "parrot_tiny"
PREFIX = "model.moe_model."


def released_loop(
    released: dict[str, Tensor], config: TextGuidedMoEConfig, features: Tensor, text: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Features and probs by the published rules, in plain torch on the released tensors."""
    outputs, all_probs = [], []
    for rows, first, last in zip(features, start.tolist(), end.tolist(), strict=True):
        span = text[first:last]
        if config.normalize_guidance:
            span = span / span.square().mean(-1, keepdim=True).sqrt()
        attention = (rows[:1] @ span.T / rows.shape[1] ** (1.0 if config.normalize_guidance else 0.5)).softmax(-1)
        probs = (config.router_scale * (attention @ span) @ released["gate.weight"].T).softmax(-1)[0]
        if config.routing == "topk":
            values, indices = (part[: config.topk] for part in probs.sort(descending=True, stable=True))
            if config.renormalize:
                values = values / values.sum()
            probs = torch.zeros_like(probs).index_put((indices,), values)
        total = torch.zeros_like(rows)
        for e, weight in enumerate(probs):
            gate, up, down = (released[f"experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            total = total + weight * F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
        w = config.residual_weight
        mixed = {"code": total + w * rows, "paper": rows + w * total, "none": total}
        outputs.append(mixed[config.residual])
        all_probs.append(probs)
    return torch.stack(outputs), torch.stack(all_probs)


def released_parameters(module: TextGuidedMoE) -> dict[str, Tensor]:
    state = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return {name: tensor.clone().requires_grad_() for name, tensor in experts_to_released(state).items()}


def assert_relative(actual: Tensor, wanted: Tensor, bound: float, name: str) -> None:
    error = float((actual - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-30))
    assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"


CONFIGS = {
    "released": TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=40),
    "weight_one": TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=12, residual_weight=1.0),
    "paper": TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=20, routing="topk", topk=2, residual="paper"),
    "no_residual": TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=7, residual="none"),
    "not_renormalized": TextGuidedMoEConfig(
        num_experts=5, ffn_hidden_size=8, routing="topk", topk=3, renormalize=False
    ),
    "top_all": TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=8, routing="topk", topk=4),
    "recompute": TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=12, recompute=True),
    "recompute_topk": TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=12, routing="topk", recompute=True),
    "normalized": TextGuidedMoEConfig(
        num_experts=6, ffn_hidden_size=12, normalize_guidance=True, router_scale=3.0, recompute=True
    ),
    "normalized_topk": TextGuidedMoEConfig(
        num_experts=5, ffn_hidden_size=12, routing="topk", normalize_guidance=True, router_scale=0.5
    ),
    "one_expert": TextGuidedMoEConfig(num_experts=1, ffn_hidden_size=8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_the_released_loop(name: str) -> None:
    config, hidden = CONFIGS[name], 24
    module = TextGuidedMoE(config, hidden)
    # Two images share the first text, one has no text at all.
    start, end = make_spans([7, 0, 5], [2, 1, 1])
    features, text = torch.randn(4, 9, hidden, requires_grad=True), torch.randn(12, hidden, requires_grad=True)
    released = released_parameters(module)
    grad = torch.randn(4, 9, hidden)

    actual, routing = module(features, text, start, end)
    actual.backward(grad)
    own_grads = {"features": features.grad, "text": text.grad}
    features.grad = text.grad = None
    wanted, probs = released_loop(released, config, features, text, start, end)
    wanted.backward(grad)

    assert_relative(actual, wanted, 1e-5, "features")
    assert_relative(routing.probs, probs, 1e-5, "probs")
    assert_relative(own_grads["features"], features.grad, 1e-5, "grad of features")
    # One expert always has weight 1: routing has no gradient, and both sides hold only rounding.
    if config.num_experts > 1:
        assert_relative(own_grads["text"], text.grad, 1e-5, "grad of text")
    own = experts_to_released({name: parameter.grad for name, parameter in module.named_parameters()})
    for key, tensor in released.items():
        if not (config.num_experts == 1 and key == "gate.weight"):
            assert_relative(own[key], tensor.grad, 1e-5, f"grad of {key}")


def test_matches_recorded_outputs_of_the_public_code() -> None:
    weights = load_file(FIXTURE / "model" / "model.safetensors")
    state = experts_from_released({k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)})
    expected = load_file(FIXTURE / "expected.safetensors")
    config = TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=96, residual="code", residual_weight=1.0)
    module = TextGuidedMoE(config, 64)
    module.load_state_dict(state)
    calls = sorted(key.removesuffix(".output") for key in expected if key.endswith(".output"))
    assert len(calls) == 10
    features = torch.stack([expected[f"{call}.image_features"] for call in calls])
    texts = [expected[f"{call}.text_embeds"] for call in calls]
    start, end = make_spans([len(text) for text in texts], [1] * len(calls))
    # All calls at once: batching over samples changes nothing.
    output, routing = module(features, torch.cat(texts), start, end)
    wanted = torch.stack([expected[f"{call}.output"] for call in calls])
    assert_relative(output, wanted, 1e-5, "output")
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(len(calls)))


@pytest.mark.parametrize("routing", ["dense", "topk"])
def test_no_image_gives_every_parameter_a_zero_gradient(routing: str) -> None:
    config = TextGuidedMoEConfig(
        num_experts=4, ffn_hidden_size=8, routing=routing, aux_loss_coeff=0.1, z_loss_coeff=0.1
    )
    module = TextGuidedMoE(config, 16)
    fired = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    none = torch.empty(0, dtype=torch.int32)
    text = torch.randn(5, 16, requires_grad=True)
    features = torch.empty(0, 9, 16, requires_grad=True)
    output, route = module(features, text, none, none)
    (output.sum() + route.aux_loss + route.z_loss).backward()
    assert output.shape == (0, 9, 16)
    assert sorted(fired) == ["router_weight", "w_down", "w_gate_up"]
    for tensor in (*module.parameters(), text):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_override_off_returns_the_features() -> None:
    module = TextGuidedMoE(CONFIGS["released"], 16)
    features = torch.randn(2, 5, 16)
    output, routing = module(features, torch.randn(3, 16), *make_spans([3], [2]), override=RoutingOverride(mode="off"))
    assert output is features
    assert not routing.probs.any()


@pytest.mark.parametrize("name", ["released", "paper"])
def test_override_of_the_weights(name: str) -> None:
    config = CONFIGS[name]
    module = TextGuidedMoE(config, 16)
    features, text = torch.randn(2, 5, 16), torch.randn(3, 16)
    spans = make_spans([3], [2])
    uniform, routing = module(features, text, *spans, override=RoutingOverride(mode="uniform"))
    same = torch.full((2, config.num_experts), 1 / config.num_experts)
    assert torch.equal(routing.probs, same)
    by_probs, _ = module(features, text, *spans, override=RoutingOverride(probs=same))
    assert torch.equal(uniform, by_probs)
    # The route of the other image, given by hand, is what that image's text would have done.
    routed, own = module(features, text, *spans)
    again, _ = module(features, text, *spans, override=RoutingOverride(probs=own.probs))
    torch.testing.assert_close(again, routed)
    assert differ(uniform, routed, atol=1e-6)
    with pytest.raises(ConfigError, match="exactly one of mode"):
        RoutingOverride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_with_gradients(dtype: torch.dtype) -> None:
    config = TextGuidedMoEConfig(
        num_experts=4, ffn_hidden_size=12, routing="topk", aux_loss_coeff=0.1, z_loss_coeff=0.1
    )
    module = TextGuidedMoE(config, 16, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    spans = make_spans([4, 3], [2, 1])
    results = []
    for call in (module, compiled):
        module.zero_grad()
        features = torch.randn(3, 5, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        text = torch.randn(7, 16, dtype=dtype, generator=torch.Generator().manual_seed(2))
        output, routing = call(features, text, *spans)
        (output.float().square().sum() + routing.aux_loss + routing.z_loss).backward()
        results.append([output, features.grad, *(p.grad for p in module.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_auxiliary_losses_reach_the_router_only_by_their_coefficients() -> None:
    config = TextGuidedMoEConfig(
        num_experts=4, ffn_hidden_size=8, routing="topk", topk=2, aux_loss_coeff=0.5, z_loss_coeff=0.25
    )
    module = TextGuidedMoE(config, 16)
    spans = make_spans([4, 3], [1, 1])
    _, routing = module(torch.randn(2, 5, 16), torch.randn(7, 16), *spans)
    scores = routing.logits.softmax(-1)
    fraction = (routing.probs > 0).float().sum(0) / 4
    torch.testing.assert_close(routing.aux_loss, 0.5 * 4 * (fraction * scores.mean(0)).sum())
    torch.testing.assert_close(routing.z_loss, 0.25 * routing.logits.logsumexp(-1).square().mean())
    (grad,) = torch.autograd.grad(routing.aux_loss + routing.z_loss, module.router_weight)
    assert grad.abs().max() > 0
    assert TextGuidedMoE(CONFIGS["released"], 16)(torch.randn(2, 5, 16), torch.randn(7, 16), *spans)[1].aux_loss is None


@pytest.mark.parametrize("names", [[7, 7, -1, 3], [-1, -1, -1, -1], [5, 5, 5, 5], None])
def test_information_loss_is_the_information_of_experts_and_languages(names: list[int] | None) -> None:
    config = TextGuidedMoEConfig(
        num_experts=4, ffn_hidden_size=8, information_coeff=0.5, normalize_guidance=True, router_scale=30.0
    )
    module = TextGuidedMoE(config, 16)
    languages = None if names is None else torch.tensor(names)
    spans = make_spans([4, 3, 2], [1, 2, 1])
    _, routing = module(torch.randn(4, 5, 16), torch.randn(9, 16), *spans, languages=languages)
    logits = routing.logits.detach().requires_grad_()
    scores = logits.softmax(-1)
    # An image of unknown language has one of its own.
    own = [name if name >= 0 else 100 + i for i, name in enumerate(names or [-1] * 4)]
    joint = torch.stack([scores[[each == name for each in own]].sum(0) / 4 for name in sorted(set(own))])
    wanted = -0.5 * (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    torch.testing.assert_close(routing.aux_loss, wanted, atol=1e-6, rtol=1e-5)
    (expected,) = torch.autograd.grad(wanted, logits)
    (grad,) = torch.autograd.grad(routing.aux_loss, routing.logits)
    assert (names == [5, 5, 5, 5]) == bool(expected.abs().max() < 1e-6)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_evenness_reaches_an_expert_that_gets_nothing() -> None:
    config = TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=8, evenness_coeff=2.0)
    module = TextGuidedMoE(config, 16)
    with torch.no_grad():  # expert 2 has a score of 0
        module.router_weight.copy_(torch.tensor([[300.0], [299.0], [-300.0]]).expand(3, 16))
    _, routing = module(torch.randn(4, 5, 16), torch.ones(4, 16), *make_spans([4], [4]))
    scores = routing.logits.softmax(-1)
    assert (scores[:, 2] == 0).all()
    (grad,) = torch.autograd.grad(routing.aux_loss, routing.logits)
    torch.testing.assert_close(grad, 2.0 * (scores.mean(0) - 1 / 3).expand(4, 3) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_guidance_does_not_depend_on_the_size_of_embeddings(dtype: torch.dtype) -> None:
    config = TextGuidedMoEConfig(num_experts=4, ffn_hidden_size=8, normalize_guidance=True)
    module = TextGuidedMoE(config, 16, dtype=dtype)
    features, text, spans = (
        torch.randn(2, 5, 16, dtype=dtype),
        torch.randn(7, 16, dtype=dtype),
        make_spans([4, 3], [1, 1]),
    )
    wanted = module(features, text, *spans)[1].logits
    assert wanted.abs().max() > 0.05
    for size in (2.0**-12, 2.0**9):
        torch.testing.assert_close(module(features, text * size, *spans)[1].logits, wanted, rtol=1e-3, atol=1e-5)
    text[0] = 0.0  # a padding row of an embedding
    assert module(features, text, *spans)[1].logits.isfinite().all()


def test_released_layout_round_trip_is_bit_equal() -> None:
    module = TextGuidedMoE(TextGuidedMoEConfig(num_experts=3, ffn_hidden_size=5), 8, dtype=torch.bfloat16)
    state = module.state_dict()
    released = experts_to_released(state)
    shapes = {"gate.weight": (3, 8)}
    for e in range(3):
        shapes |= {f"experts.{e}.{part}_proj.weight": (5, 8) for part in ("gate", "up")}
        shapes[f"experts.{e}.down_proj.weight"] = (8, 5)
    assert {name: tuple(tensor.shape) for name, tensor in released.items()} == shapes
    assert all(tensor.is_contiguous() for tensor in released.values())
    back = experts_from_released(released)
    assert all(torch.equal(back[name], state[name]) for name in state)
    for name, keys in released_keys(3).items():
        assert torch.equal(pack_released(name, [released[key] for key in keys]), state[name])
        assert len(unpack_released(name, state[name])) == len(keys)


def test_released_tensors_that_do_not_fit_are_named() -> None:
    released = experts_to_released(TextGuidedMoE(TextGuidedMoEConfig(num_experts=2, ffn_hidden_size=5), 8).state_dict())
    released["gating.bias"] = released.pop("gate.weight")
    with pytest.raises(CheckpointError, match=r"missing \['gate.weight'\], unexpected \['gating.bias'\]"):
        experts_from_released(released)


def test_initialisation_is_that_of_linear_layers() -> None:
    torch.manual_seed(0)
    module = TextGuidedMoE(TextGuidedMoEConfig(num_experts=6, ffn_hidden_size=100), 64)
    for weight, fan_in in ((module.router_weight, 64), (module.w_gate_up, 64), (module.w_down, 100)):
        bound = 1 / math.sqrt(fan_in)
        assert weight.abs().max() <= bound
        assert abs(float(weight.detach().std()) * math.sqrt(3) / bound - 1) < 0.1
    reference = torch.nn.Linear(64, 100, bias=False).weight
    assert abs(float((module.w_gate_up.std() / reference.std()).detach()) - 1) < 0.05


def test_meta_device_and_parameter_count_of_parrot_7b() -> None:
    module = TextGuidedMoE(TextGuidedMoEConfig(), 4096, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in module.parameters()) == 302_014_464
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_zero_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts must be >= 1"):
        TextGuidedMoE(TextGuidedMoEConfig(num_experts=0), 8)
