"""The model object against the released code's fixture and against an independent model of other shapes."""

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
from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.modules.text_guided_moe import RoutingOverride
from tests.inference.released_reference import (
    FIXTURE,
    IGNORE,
    IMAGE,
    PAD,
    ReleasedParrot,
    Shape,
    batch_loss,
    pad,
    random_batch,
    write_checkpoint,
)


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def tiny() -> ParrotForConditionalGeneration:
    return parrot_sys.load_pretrained(FIXTURE / "model")[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("number", range(4))
def test_fixture_logits_and_loss(
    tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor], facts: dict[str, Any], number: int
) -> None:
    ids, labels, images = (expected[f"batch{number}.{name}"] for name in ("input_ids", "labels", "images"))
    mask = ids != PAD
    output = tiny(ids, attention_mask=mask, images=images, labels=labels)
    assert abs(float(output.loss) - facts["batches"][number]["loss"]) < 1e-4
    wanted = expected[f"batch{number}.logits"]
    assert output.logits.shape == wanted.shape
    for sample in range(len(ids)):
        rows = int(mask[sample].sum()) + 16 * int((ids[sample] == IMAGE).sum())  # V = 17; later rows are padding
        assert _relative(output.logits[sample, :rows], wanted[sample, :rows]) < 1e-4
        assert not output.logits[sample, rows:].any()


def test_fixture_gradients(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    tiny.zero_grad()
    ids = expected["batch0.input_ids"]
    tiny(ids, ids != PAD, expected["batch0.images"], expected["batch0.labels"]).loss.backward()
    gradients = tiny.hf_gradients()
    names = [key.removeprefix("batch0.grad.") for key in expected if key.startswith("batch0.grad.")]
    assert len(names) == 24
    for name in names:
        assert _relative(gradients[name], expected[f"batch0.grad.{name}"]) < 1e-3, name
    assert not any("vision_tower" in name for name in gradients)  # frozen


@pytest.mark.parametrize("number", range(4))
def test_fixture_moe(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor], number: int) -> None:
    calls = sum(key.startswith(f"batch{number}.moe") and key.endswith("output") for key in expected)
    assert calls
    for call in range(calls):
        image, text, wanted = (
            expected[f"batch{number}.moe{call}.{name}"] for name in ("image_features", "text_embeds", "output")
        )
        start, end = torch.tensor([0], dtype=torch.int32), torch.tensor([len(text)], dtype=torch.int32)
        output, routing = tiny.model.moe(image[None], text, start, end)
        assert _relative(output[0], wanted) < 1e-4
        gate = tiny.hf_state_dict()["model.moe_model.gate.weight"]
        attention = (image[:1] @ text.T / 8.0).softmax(-1)  # sqrt(64)
        assert _relative(routing.probs[0], (attention @ text @ gate.T).softmax(-1)[0]) < 1e-4


def test_text_only_sample_needs_no_dummy(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    """The released code gives a text-only sample a zero image: with it or without, the output is the same."""
    ids, images = expected["batch3.input_ids"], expected["batch3.images"]
    with_marker = (ids == IMAGE).any(1)
    assert not with_marker.all()
    output = tiny(ids, ids != PAD, images).logits
    assert torch.equal(tiny(ids, ids != PAD, images[with_marker]).logits, output)
    assert torch.equal(tiny(ids, ids != PAD, list(images[with_marker])).logits, output)


def test_left_padding_and_no_mask(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    rows = [row[row != PAD] for row in expected["batch2.input_ids"]]
    images = expected["batch2.images"]
    right, left = pad(rows, PAD), pad(rows, PAD, left=True)
    wanted = tiny(right, right != PAD, images).logits
    assert torch.equal(tiny(left, left != PAD, images).logits, wanted)
    alone = tiny(rows[0][None], images=images[:1]).logits
    assert _relative(wanted[0, : alone.shape[1]], alone[0]) < 1e-5


SHAPES = {
    "grouped-query": Shape(),
    "one-expert-no-residual": Shape(experts=1, inner=7, residual_weight=None, kv_heads=6, projector=1),
    "tied-multi-head": Shape(heads=4, kv_heads=1, tied=True, experts=5, residual_weight=2.0, projector=3),
    "experts-bypassed": Shape(use_moe=False),
    "siglip": Shape(tower="siglip", experts=2),
}
COUNTS = [1, 2, 0, 3]
"""Images of each sample: one, several, none."""


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    reference = ReleasedParrot(SHAPES[name])
    state = write_checkpoint(reference, tmp_path / "model")
    model, _ = parrot_sys.load_pretrained(tmp_path / "model")
    ids, labels, images = random_batch(COUNTS)
    results = [
        reference.sample_logits(row, target, part)
        for row, target, part in zip(ids, labels, images.split(COUNTS), strict=True)
    ]
    loss = batch_loss(results)
    loss.backward()
    padded, targets = pad(ids, PAD), pad(labels, IGNORE)
    mask = pad([torch.ones_like(row) for row in ids], 0)
    model.requires_grad_(True)
    output = model(padded, mask, images, targets)
    output.loss.backward()
    assert _relative(output.loss, loss) < 1e-5
    assert output.logits.shape[1] == max(len(rows) for rows, _ in results)
    for got, (wanted, _) in zip(output.logits, results, strict=True):
        assert _relative(got[: len(wanted)], wanted) < 1e-4
    _compare_gradients(model.hf_gradients(), reference)
    exported = model.hf_state_dict()
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in state.items())


def _compare_gradients(ours: dict[str, Tensor], reference: ReleasedParrot) -> None:
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        # Softmax ignores key biases and one expert's gate, so those gradients are zero up to rounding.
        error = float((gradient - theirs[name]).abs().max())
        assert error <= 1e-3 * float(theirs[name].abs().max()) + 1e-7 * largest, name


def test_routing_override_changes_logits(tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]) -> None:
    ids, images = expected["batch1.input_ids"], expected["batch1.images"]
    plain = tiny(ids, images=images)
    assert plain.routing.probs.shape == (1, 6)
    for mode in ("off", "uniform"):
        assert (
            _relative(tiny(ids, images=images, routing_override=RoutingOverride(mode=mode)).logits, plain.logits) > 1e-3
        )


def test_wrong_inputs(tiny: ParrotForConditionalGeneration) -> None:
    ids = torch.tensor([[1, IMAGE, 2], [3, 4, 5]])
    image = torch.zeros(1, 3, 56, 56)
    with pytest.raises(DataError, match=r"1 image markers .* 2 samples .* got 3"):
        tiny(ids, images=image.repeat(3, 1, 1, 1))
    with pytest.raises(DataError, match="got 0"):
        tiny(ids)
    with pytest.raises(DataError, match=r"attention_mask must be \[2, 3\]"):
        tiny(ids, torch.ones(1, 3), image)
    with pytest.raises(DataError, match=r"samples \[1\]"):
        tiny(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]), image)
    for wrong in (-7, tiny.config.llm.vocab_size):
        with pytest.raises(DataError, match=rf"-200 \(an image\) or in \[0, \d+\), got {wrong} in sample 0"):
            tiny(torch.tensor([[1, wrong]]))
    with pytest.raises(DataError, match=r"input_ids must be \[B, N\]"):
        tiny(ids[0], images=image)
    two_markers = torch.tensor([[IMAGE, IMAGE, 2], [3, 4, 5], [6, 7, 8]])
    with pytest.raises(DataError, match=r"\[2, 0, 0\] markers"):
        tiny(two_markers, images=image.repeat(3, 1, 1, 1))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        parrot_sys.load_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        parrot_sys.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision(
    dtype: str | torch.dtype, tiny: ParrotForConditionalGeneration, expected: dict[str, Tensor]
) -> None:
    model, _ = parrot_sys.load_pretrained(FIXTURE / "model", dtype=dtype)
    ids, images = expected["batch1.input_ids"], expected["batch1.images"]
    logits = model(ids, images=images).logits
    assert logits.dtype == torch.float32
    assert 1e-5 < _relative(logits, tiny(ids, images=images).logits) < 0.05
    assert model.generate(ids, images=images, max_new_tokens=2, eos_token_id=[]).shape == (1, ids.shape[1] + 2)
