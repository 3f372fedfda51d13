"""The resampler against the released one's outputs, and its size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parrot_sys.errors import ConfigError
from parrot_sys.modules.perceiver import PerceiverResampler, ResamplerConfig
from parrot_sys.systems.multimodal_gpt.config import FlamingoConfig
from parrot_sys.systems.multimodal_gpt.maps import resampler_maps

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mmgpt_tiny"
WIDTH = 32


def released() -> PerceiverResampler:
    weights = torch.load(FIXTURE / "open_flamingo.pt", weights_only=True)
    state = {
        entry.name: entry.pack([weights[key] for key in entry.keys])
        for entry in resampler_maps(FlamingoConfig(), WIDTH, prefix="")
    }
    resampler = PerceiverResampler(ResamplerConfig(), WIDTH)
    resampler.load_state_dict(state)
    return resampler


@pytest.mark.parametrize("batch", ["one_image", "two_images"])
def test_matches_released_outputs(batch: str) -> None:
    expected = load_file(FIXTURE / "expected.safetensors")
    features, wanted = expected[f"{batch}.perceiver_in"], expected[f"{batch}.perceiver_out"]
    output = released()(features.flatten(0, 2))
    error = (output - wanted.flatten(0, 1)).abs().max() / wanted.abs().max()
    assert error < 1e-5


def test_no_images() -> None:
    resampler = PerceiverResampler(ResamplerConfig(num_latents=3, num_layers=2), 8)
    output = resampler(torch.empty(0, 5, 8))
    assert output.shape == (0, 3, 8)
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in resampler.parameters())


def test_size_of_open_flamingo_9b() -> None:
    resampler = PerceiverResampler(ResamplerConfig(), 1024, device="meta")
    assert sum(p.numel() for p in resampler.parameters()) == 63_019_008


def test_wrong_sizes() -> None:
    with pytest.raises(ConfigError, match=r"resampler\.num_latents must be >= 1, got 0"):
        ResamplerConfig(num_latents=0)
