"""The released Wings: logits, loss, router weights, gradients, greedy tokens of the public code; files bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import parrot_sys
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.inference.pretrained import save_pretrained
from parrot_sys.megatron.runtime.initialize import shutdown

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wings_tiny"
IMAGE, PAD, V = -200, 630, 16


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def released() -> ParrotForConditionalGeneration:
    return parrot_sys.load_pretrained(FIXTURE / "model", compat="released")[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("number", range(5))
def test_logits_loss_and_router_weights(
    released: ParrotForConditionalGeneration, expected: dict[str, Tensor], facts: dict[str, Any], number: int
) -> None:
    ids, labels = expected[f"batch{number}.input_ids"], expected[f"batch{number}.labels"]
    mask = ids != PAD
    images = expected.get(f"batch{number}.images")
    output = released(ids, mask, images, labels, output_router_weights=True)
    assert abs(float(output.loss.detach()) - facts["batches"][number]["loss"]) < 1e-4
    assert output.logits.shape == expected[f"batch{number}.logits"].shape
    for sample, own in enumerate(ids):
        rows = int(mask[sample].sum()) + (V - 1) * int((own == IMAGE).sum())  # later rows are padding
        wanted = expected[f"batch{number}.logits"][sample, :rows]
        assert relative(output.logits[sample, :rows], wanted) < 1e-4
        for layer in range(2) if images is not None else ():
            wanted = expected[f"batch{number}.router_weights.{layer}"][sample, :rows]
            assert relative(output.router_weights[layer + 1][sample, :rows], wanted) < 1e-4


@pytest.mark.parametrize("number", range(2))
def test_gradients(released: ParrotForConditionalGeneration, expected: dict[str, Tensor], number: int) -> None:
    released.zero_grad()
    ids = expected[f"batch{number}.input_ids"]
    released(ids, ids != PAD, expected[f"batch{number}.images"], expected[f"batch{number}.labels"]).loss.backward()
    gradients = released.hf_gradients()
    prefix = f"batch{number}.grad."
    names = [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]
    assert len(names) == 18
    for name in names:
        wanted = expected[prefix + name]
        ours = gradients[name]
        if name.endswith("linear.weight"):  # of the 4096 positions, those that a row can have are kept
            assert not ours[:, wanted.shape[1] :].any()
            ours = ours[:, : wanted.shape[1]]
        assert relative(ours, wanted) < 1e-3, name


def test_greedy_tokens(
    released: ParrotForConditionalGeneration, expected: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    case = facts["generate"]
    images = expected["pixel_values"][case["image"]][None]
    count = len(case["output_ids"]) - len(case["prompt_ids"])
    ids = released.generate(torch.tensor([case["prompt_ids"]]), images=images, max_new_tokens=count)
    assert ids[0].tolist() == case["output_ids"]


def test_several_images_need_the_papers_rule(
    released: ParrotForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    ids = torch.cat([expected["batch0.input_ids"], expected["batch1.input_ids"]], dim=1)
    with pytest.raises(DataError, match="one whole image a sample"):
        released(ids, images=expected["pixel_values"][:2])


def test_export_is_bit_equal(tmp_path: Path) -> None:
    model, processor = parrot_sys.load_pretrained(FIXTURE / "model")
    save_pretrained(model, processor, tmp_path / "out")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", FIXTURE / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", FIXTURE / "model")]
    assert configs[0] == configs[1] | {"mm_vision_tower": configs[0]["mm_vision_tower"]}
    again = parrot_sys.load_pretrained(tmp_path / "out", compat="released")[0]
    assert again.config.wings == model.config.with_compat("released").wings


def test_unknown_compat() -> None:
    with pytest.raises(ConfigError, match="compat must be"):
        parrot_sys.load_pretrained(FIXTURE / "model", compat="public")


def test_convert_to_a_training_checkpoint_and_back(tmp_path: Path) -> None:
    convert(ConvertConfig(checkpoint=FIXTURE / "model", output=tmp_path / "training", format="megatron"))
    convert(ConvertConfig(checkpoint=tmp_path / "training", output=tmp_path / "hf"))
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", FIXTURE / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
