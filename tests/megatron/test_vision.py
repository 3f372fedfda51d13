"""Vision towers against the models of transformers: features and all gradients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from parrot_sys.errors import ConfigError
from parrot_sys.megatron.runtime.initialize import initialize, shutdown
from parrot_sys.megatron.vision import VisionTransformer, build_vision_tower
from parrot_sys.models.tower_maps import tower_maps
from parrot_sys.towers import KNOWN_TOWERS, VisionConfig, vision_config_from_hf

SIZES = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 7}


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    initialize()
    yield
    shutdown()


def _reference(kind: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    values = {**SIZES, "image_size": 28, "attn_implementation": "eager", **changes}
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**values))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**values))
    else:
        del values["intermediate_size"]
        model = Dinov2Model(Dinov2Config(mlp_ratio=2, **values))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero and norms at one: make every tensor matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _released(name: str) -> str:
    """Name of a tensor of transformers' modules in published checkpoints; they differ for DINOv2 alone."""
    for module, published in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name = name.replace(f".attention.{module}.", f".attention.attention.{published}.")
    return name.replace(".attention.o_proj.", ".attention.output.dense.")


def _named(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {_released(name): tensor for name, tensor in tensors if name != "embeddings.mask_token"}


def _load(tower: VisionTransformer, state: dict[str, torch.Tensor]) -> None:
    ours = dict(tower.named_parameters()) | dict(tower.named_buffers())
    with torch.no_grad():
        for entry in tower_maps(tower.vision, key_prefix=""):
            ours.pop(entry.name).copy_(entry.pack([state[key] for key in entry.keys]))
    assert not ours


def _tower(reference: torch.nn.Module, **changes: object) -> VisionTransformer:
    config = dataclasses.replace(vision_config_from_hf(reference.config.to_dict()), **changes)
    tower = build_vision_tower(config)
    assert isinstance(tower, VisionTransformer)
    _load(tower, _named(reference.state_dict().items()))
    return tower


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("select_layer", [-1, -2, 0, 1])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [("clip", "quick_gelu"), ("clip", "gelu"), ("siglip", "gelu_pytorch_tanh"), ("dinov2", "gelu")],
)
def test_features_and_gradients(kind: str, activation: str, select_layer: int) -> None:
    reference = _reference(kind, hidden_act=activation)
    tower = _tower(reference, select_layer=select_layer)
    pixels = torch.randn(3, 3, 28, 28)
    expected = reference(pixels, output_hidden_states=True).hidden_states[select_layer]
    if kind == "siglip":
        expected = torch.cat([expected.mean(1, keepdim=True), expected], 1)
    output = tower(pixels)
    _close(output, expected, 1e-5)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (output * weight).sum().backward()
    gradients = _named(reference.named_parameters())
    ours = dict(tower.named_parameters())
    compared = set()
    for entry in tower_maps(tower.vision, key_prefix=""):
        for key, gradient in zip(
            entry.keys, entry.unpack(ours[entry.name].grad) if entry.name in ours else (), strict=False
        ):
            compared.add(key)
            if key.endswith(("k_proj.bias", "key.bias")):  # softmax ignores it: zero up to rounding
                assert gradient.abs().max() < 1e-4
            else:
                _close(gradient, gradients[key].grad, 1e-5)
    assert {key for key, parameter in gradients.items() if parameter.grad is not None} == compared


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_unused_weights_are_buffers_and_survive(kind: str) -> None:
    """The last block and the final norm are kept for export but have no parameter that an optimizer could touch."""
    reference = _reference(kind)
    tower = _tower(reference)
    state = _named(reference.state_dict().items())
    names = dict(tower.named_parameters()) | dict(tower.named_buffers())
    exported = {
        key: tensor
        for entry in tower_maps(tower.vision, key_prefix="")
        for key, tensor in zip(entry.keys, entry.unpack(names[entry.name]), strict=True)
    }
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)
    assert len(tower.encoder.layers) == 2
    assert not any("layers.2" in name for name, _ in tower.named_parameters())


def test_rows_see_later_rows() -> None:
    """The tower's attention is not causal: the last patch changes row 0."""
    tower = _tower(_reference("clip"))
    pixels = torch.randn(1, 3, 28, 28)
    changed = pixels.clone()
    changed[:, :, -7:, -7:] += 1.0
    assert (tower(pixels)[:, 0] - tower(changed)[:, 0]).abs().max() > 1e-3


def test_no_images_and_frozen() -> None:
    tower = _tower(_reference("siglip"))
    features = tower(torch.empty(0, 3, 28, 28))
    assert features.shape == (0, 17, 32)
    features.sum().backward()  # gradient hooks of every parameter must fire on a rank without images
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())
    tower.requires_grad_(False)
    assert not tower(torch.randn(1, 3, 28, 28)).requires_grad


def test_wrong_image_size() -> None:
    tower = _tower(_reference("clip"))
    with pytest.raises(ConfigError, match=r"\[n, 3, 28, 28\].*\[1, 3, 14, 28\]"):
        tower(torch.randn(1, 3, 14, 28))


def test_efficientnet_is_dispatched() -> None:
    tower = build_vision_tower(
        VisionConfig(type="efficientnet_lite0", image_size=64, hidden_size=1280, activation="relu6")
    )
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 5, 1280)


@pytest.mark.parametrize("name", KNOWN_TOWERS)
def test_known_towers_have_their_public_sizes(name: str) -> None:
    """Towers that checkpoints name by a hub id, against the sizes that their names and papers tell."""
    config = KNOWN_TOWERS[name]
    kind, size, patch = re.fullmatch(r"(\w+?)2?-(?:vit-)?(\w+)(?:-patch(\d+).*)?", name).groups()
    widths = {"small": 384, "base": 768, "large": 1024, "so400m": 1152}
    assert (config.tower.name.startswith(kind), config.hidden_size) == (True, widths[size])
    assert config.patch_size == int(patch or 14)
    assert config.ffn_hidden_size == (4304 if size == "so400m" else 4 * config.hidden_size)
    if (side := re.search(r"-(\d{3})$", name)) is not None:
        assert config.image_size == int(side[1])
    assert build_vision_tower(dataclasses.replace(config, num_layers=1, select_layer=1), initialize_weights=False)
