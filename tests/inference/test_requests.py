"""Refusals: requests that are too long, padding that could be text, logits that are no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parrot_sys.errors import CheckpointError, DataError
from parrot_sys.inference.inputs import padding_mask
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.inference.mixed_requests import limited

FIXTURES = Path(__file__).parents[1] / "fixtures"
PAD = 630
LIMIT = 40


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def _load(name: str, **options: Any) -> ParrotForConditionalGeneration:
    return limited(FIXTURES / name / "model", LIMIT, **options)


@pytest.fixture(scope="module")
def tiny() -> ParrotForConditionalGeneration:
    return _load("parrot_tiny")


def _calls(model: ParrotForConditionalGeneration, rows: int, images: int, new: int) -> dict[str, Callable[[], Any]]:
    """Each way to ask for `rows` rows with those of the images and of the new tokens."""
    text = rows - images * model.config.rows_per_image
    side = model.config.vision.image_size
    pixels = torch.zeros(images, 3, side, side)

    def ids(count: int) -> Tensor:
        return torch.tensor([[-200] * images + [7] * count])

    return {
        "forward": lambda: model(ids(text), images=pixels).logits,
        "generate": lambda: model.generate(ids(text - new), images=pixels, max_new_tokens=new, eos_token_id=[]),
        # (The last token that is scored takes no row.)
        "score": lambda: model.score(ids(text - new), [[[5] * new + [6], [6]]], images=pixels),
    }


@pytest.mark.parametrize("use", ["forward", "generate", "score"])
@settings(max_examples=5, deadline=None)
@given(images=st.integers(0, 1), new=st.integers(1, 4), more=st.integers(1, 30))
def test_one_limit_for_all(tiny: ParrotForConditionalGeneration, use: str, images: int, new: int, more: int) -> None:
    with torch.no_grad():
        _calls(tiny, LIMIT, images, new)[use]()
        with pytest.raises(
            DataError, match=rf"exceeds the {LIMIT} positions of a request \(model.max_seq_len={LIMIT}, "
        ):
            _calls(tiny, LIMIT + more, images, new)[use]()


def test_truncation_is_asked_for(tiny: ParrotForConditionalGeneration) -> None:
    ids = torch.tensor([[7] * (LIMIT + 9), [8] * (LIMIT + 9)])
    with torch.no_grad():
        with pytest.raises(DataError, match=r"request 0 has 49 rows .*: shorten it, or pass truncation=True"):
            tiny(ids)
        cut = tiny(ids, truncation=True).logits
        assert torch.equal(cut, tiny(ids[:, :LIMIT]).logits)


def test_without_a_number_an_answer_fits(tiny: ParrotForConditionalGeneration) -> None:
    ids = torch.tensor([[7] * 30 + [PAD] * 7, [8] * 37])
    output = tiny.generate(ids, eos_token_id=[])
    assert output.shape[1] == 37 + 10
    assert (output[1, 37 + 3 :] == PAD).all(), "the longer prompt leaves three rows"


@given(left=st.integers(0, 3), right=st.integers(0, 3), text=st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_padding_is_what_stands_at_an_end(left: int, right: int, text: list[int]) -> None:
    ids = torch.tensor([[0] * left + text + [0] * right])
    inside = [i for i, token in enumerate(ids[0].tolist()) if token]
    mask = padding_mask(ids, 0, [3])
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[0, slice(inside[0], inside[-1] + 1) if inside else slice(None)] = True
    assert wanted.all() if mask is None else torch.equal(mask, wanted)
    assert padding_mask(ids, None, [3]) is None
    assert padding_mask(ids, 0, [0]) is None, "alone in its batch it is not padded"
    rows = torch.cat([torch.full_like(ids, 2), ids])
    if not inside or (ids[0, 0] and ids[0, -1]):
        assert padding_mask(rows, 0, [0]) is None
    else:
        with pytest.raises(DataError, match="sample 1 of input_ids begins or ends with id 0"):
            padding_mask(rows, 0, [0])


def test_padding_without_a_mask_changes_nothing(tiny: ParrotForConditionalGeneration) -> None:
    ids = torch.tensor([[5, 9, 7, PAD, PAD], [8, 3, 4, 6, 11]])
    alone, mask = ids[:1, :3], (ids != PAD).long()
    options = [[[3, 4], [8]], [[1]]]
    with torch.no_grad():
        assert torch.equal(tiny(ids).logits, tiny(ids, mask).logits)
        torch.testing.assert_close(tiny.score(ids, options)[0], tiny.score(alone, options[:1])[0])
        output = tiny.generate(ids, max_new_tokens=4)
        assert torch.equal(output[0, 5:], tiny.generate(alone, max_new_tokens=4)[0, 3:])
        with pytest.raises(DataError, match="sample 0 of input_ids begins or ends with id 632"):
            tiny.generate(torch.where(ids == PAD, 632, ids), pad_token_id=632)


POISONS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("system", ["parrot", "wings-released"])
def test_logits_that_are_no_numbers_choose_nothing(poison: str, system: str) -> None:
    name, compat = {"parrot": ("parrot_tiny", None), "wings-released": ("wings_tiny", "released")}[system]
    model = _load(name, compat=compat)
    ids, value = torch.tensor([[5, 6, 7], [8, 9, 10]]), POISONS[poison]
    head = model.model.decoder.output_layer.weight
    with torch.no_grad():
        head[17] = value  # of one token of the vocabulary
    for options in ({}, {"do_sample": True, "seed": 1}, {"do_sample": True, "top_k": 3}, {"repetition_penalty": 2.0}):
        with pytest.raises(CheckpointError, match=r"request 0 and 1 more: 1 of \d+ logits are NaN or infinite"):
            model.generate(ids, max_new_tokens=3, **options)
    with pytest.raises(CheckpointError, match=r"request 0 and 1 more: 1 of \d+ logits"):
        model.score(ids, [[[3], [4]], [[3], [4]]])


def test_only_the_request_that_meets_a_bad_number_is_named(tiny: ParrotForConditionalGeneration) -> None:
    """One word's embedding is NaN: the second request has it in its prompt, the third one says it."""
    ids = torch.tensor([[5, 6, 7], [8, 99, 10], [11, 12, 13]])
    first, second = tiny.generate(ids[[0, 2]], max_new_tokens=2, eos_token_id=[])[:, 3].tolist()
    assert first != second
    embedding = tiny.model.decoder.embedding.word_embeddings.weight
    kept = embedding.detach().clone()
    try:
        with torch.no_grad():
            embedding[99] = float("nan")
        with pytest.raises(CheckpointError, match=r"^request 1: \d+ of"):
            tiny.generate(ids, max_new_tokens=2)
        with pytest.raises(CheckpointError, match=r"^request 1: \d+ of"):
            tiny.score(ids, [[[3]], [[3]], [[3]]])
        with pytest.raises(CheckpointError, match=r"^request 2: \d+ of"):
            tiny.score(ids[[0, 0, 0]], [[[3, 4]], [[5, 6]], [[3], [99, 4]]])
        with torch.no_grad():
            embedding[99], embedding[second] = kept[99], float("nan")
        with pytest.raises(CheckpointError, match=r"^request 2: \d+ of"):
            tiny.generate(ids, max_new_tokens=2, eos_token_id=[])
    finally:
        with torch.no_grad():
            embedding.copy_(kept)
