"""Attention masses against the attention matrix of the public code, and their refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

import parrot_sys
from parrot_sys.data.packing import Sample
from parrot_sys.errors import DataError
from parrot_sys.inference.attention_mass import attention_mass
from parrot_sys.megatron.initialize import shutdown
from tests.inference.test_wings_fixture import FIXTURE, IMAGE, V


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def test_masses_are_those_of_the_attention_matrix() -> None:
    model = parrot_sys.load_pretrained(FIXTURE / "model", compat="released")[0].model
    expected = load_file(FIXTURE / "expected.safetensors")
    ids, weights = expected["batch1.input_ids"][0], expected["batch1.attn_probs.0"][0]  # [heads, N, N], first layer
    masses = attention_mass(model, Sample(input_ids=ids, pixel_values=expected["batch1.images"]))
    assert masses.shape == (2, 2)
    first = int((ids == IMAGE).int().argmax())
    behind = weights.mean(0)[first + V :]
    wanted = torch.stack((behind[:, :first].sum(1).mean(), behind[:, first + V :].sum(1).mean()))
    torch.testing.assert_close(masses[0], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="an image and text behind it"):
        attention_mass(model, Sample(input_ids=torch.arange(5)))
