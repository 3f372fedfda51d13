"""Greedy tokens of the released code, padding, sampling, streaming and option scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import parrot_sys
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.inference.model import ParrotForConditionalGeneration
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.modules.text_guided_moe import RoutingOverride
from tests.comparisons import differ
from tests.inference.released_reference import FIXTURE, PAD, ReleasedParrot, Shape, pad, random_batch, write_checkpoint


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def tiny() -> ParrotForConditionalGeneration:
    return parrot_sys.load_pretrained(FIXTURE / "model")[0]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))["generate"]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return load_file(FIXTURE / "expected.safetensors")["pixel_values"]


def _images(cases: list[dict[str, Any]], pixels: Tensor) -> Tensor:
    return pixels[[case["image"] for case in cases]]


@pytest.mark.parametrize("number", range(6))
def test_greedy_tokens_one_at_a_time(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor, number: int
) -> None:
    case = cases[number]
    count = len(case["output_ids"]) - len(case["prompt_ids"])
    output = tiny.generate(torch.tensor([case["prompt_ids"]]), images=_images([case], pixels), max_new_tokens=count)
    assert output.tolist() == [case["output_ids"]]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_greedy_tokens_of_a_padded_batch(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor, left: bool
) -> None:
    prompts = [torch.tensor(case["prompt_ids"]) for case in cases]
    ids, mask = pad(prompts, PAD, left=left), pad([torch.ones_like(p) for p in prompts], 0, left=left)
    assert not mask.all()
    count = max(len(case["output_ids"]) - len(case["prompt_ids"]) for case in cases)
    output = tiny.generate(ids, mask, _images(cases, pixels), max_new_tokens=count)
    assert torch.equal(output[:, : ids.shape[1]], ids)
    for row, case in zip(output[:, ids.shape[1] :].tolist(), cases, strict=True):
        answer = case["output_ids"][len(case["prompt_ids"]) :]
        assert row == answer + [PAD] * (count - len(answer))
    if PAD not in tiny.eos_token_ids:  # then the ids alone tell what is padding
        without_mask = tiny.generate(ids, images=_images(cases, pixels), max_new_tokens=count, pad_token_id=PAD)
        assert torch.equal(without_mask, output)


def test_the_call_of_the_released_code(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor
) -> None:
    case = cases[0]
    ids, image = torch.tensor([case["prompt_ids"]]), _images([case], pixels)
    settings: dict[str, Any] = {"do_sample": False, "temperature": 0, "top_p": None, "repetition_penalty": None}
    output = tiny.generate(ids, images=image, max_new_tokens=3, num_beams=1, use_cache=True, **settings)
    assert torch.equal(output, tiny.generate(ids, images=image, max_new_tokens=3))
    assert torch.equal(output, tiny.generate(ids, images=image, max_new_tokens=3, use_cache=False))
    with pytest.raises(ConfigError, match="num_beams must be 1, got 4"):
        tiny.generate(ids, images=image, num_beams=4)


def test_eos_ends_one_request_and_not_the_others(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor
) -> None:
    """The end of one answer drops its request from the cache; the others go on unchanged."""
    prompts = [torch.tensor(case["prompt_ids"]) for case in cases]
    answers = [case["output_ids"][len(case["prompt_ids"]) :] for case in cases]
    ends = (answers[0][2], answers[3][5])
    ids, mask = pad(prompts, PAD), pad([torch.ones_like(p) for p in prompts], 0)
    output = tiny.generate(ids, mask, _images(cases, pixels), max_new_tokens=12, eos_token_id=ends, pad_token_id=7)
    for row, answer in zip(output[:, ids.shape[1] :].tolist(), answers, strict=True):
        stop = min((answer.index(end) + 1 for end in ends if end in answer), default=len(answer))
        assert row == answer[:stop] + [7] * (12 - stop)


def test_stops_when_all_have_ended(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor
) -> None:
    case = cases[0]
    first = case["output_ids"][len(case["prompt_ids"])]
    ids = torch.tensor([case["prompt_ids"]])
    output = tiny.generate(ids, images=_images([case], pixels), max_new_tokens=12, eos_token_id=first)
    assert output[0, ids.shape[1] :].tolist() == [first]


@pytest.mark.parametrize("counts", [[1, 2, 0], [0, 0], [3]], ids=["mixed", "text-only", "three-images"])
def test_greedy_of_other_shapes(counts: list[int], tmp_path: Any) -> None:
    torch.manual_seed(9)
    reference = ReleasedParrot(Shape())
    write_checkpoint(reference, tmp_path / "model")
    model, _ = parrot_sys.load_pretrained(tmp_path / "model")
    ids, _, images = random_batch(counts)
    with torch.no_grad():
        wanted = [reference.greedy(row, part, 6) for row, part in zip(ids, images.split(counts), strict=True)]
    padded, mask = pad(ids, PAD, left=True), pad([torch.ones_like(row) for row in ids], 0, left=True)
    output, routing = model.generate(padded, mask, images, max_new_tokens=6, eos_token_id=[], return_routing=True)
    assert output[:, padded.shape[1] :].tolist() == wanted
    if sum(counts):
        assert routing.probs.shape == (sum(counts), 3)
    else:
        assert routing is None


def test_sampling_repeats_with_a_seed(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor
) -> None:
    ids, images = torch.tensor([cases[0]["prompt_ids"]]), _images(cases[:1], pixels)
    options: dict[str, Any] = {
        "images": images,
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 1.5,
        "eos_token_id": [],
    }
    first = tiny.generate(ids, seed=1, **options)
    assert torch.equal(first, tiny.generate(ids, seed=1, **options))
    assert differ(first, tiny.generate(ids, seed=2, **options))
    greedy = tiny.generate(ids, images=images, max_new_tokens=8, eos_token_id=[])
    assert torch.equal(greedy, tiny.generate(ids, seed=3, top_k=1, **options))


def test_repetition_penalty(tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor) -> None:
    """The fixture's first answer repeats a token eight times; a strong penalty forbids every repetition."""
    ids, images = torch.tensor([cases[0]["prompt_ids"]]), _images(cases[:1], pixels)
    output = tiny.generate(ids, images=images, max_new_tokens=12, repetition_penalty=50.0, eos_token_id=[])[
        0, ids.shape[1] :
    ]
    assert len(set(output.tolist())) == 12
    assert not set(output.tolist()) & set(cases[0]["prompt_ids"])


def test_streamer_and_override(
    tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor
) -> None:
    class Log:
        def __init__(self) -> None:
            self.values: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended = True

    log, ids, images = Log(), torch.tensor([cases[1]["prompt_ids"]]), _images(cases[1:2], pixels)
    output = tiny.generate(ids, images=images, max_new_tokens=4, streamer=log)
    assert torch.equal(log.values[0], ids)
    assert log.ended
    assert torch.equal(torch.stack(log.values[1:], 1), output[:, ids.shape[1] :])
    override = RoutingOverride(probs=torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 9.0]]))
    _, routing = tiny.generate(ids, images=images, max_new_tokens=1, routing_override=override, return_routing=True)
    assert routing.probs.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 9.0]]


def test_option_scores(tiny: ParrotForConditionalGeneration, cases: list[dict[str, Any]], pixels: Tensor) -> None:
    """Against the log-probabilities of whole sequences, in which the continuation does not guide the route."""
    options = [[[3], [4, 5, 6], [3, 9]], [[100]], [[7, 7], [8]]]
    prompts = [torch.tensor(case["prompt_ids"]) for case in cases[:3]]
    ids, mask = pad(prompts, PAD), pad([torch.ones_like(p) for p in prompts], 0)
    scores = tiny.score(ids, options, mask, _images(cases[:3], pixels))
    for index, prompt in enumerate(prompts):
        for option, got in zip(options[index], scores[index], strict=True):
            answer = torch.tensor(option)
            labels = torch.cat([torch.full_like(prompt, -100), answer])[None]
            output = tiny(
                torch.cat([prompt, answer])[None], images=_images(cases[index : index + 1], pixels), labels=labels
            )
            assert abs(float(got) + float(output.loss) * len(option)) < 1e-4
    with pytest.raises(DataError, match="prompt 1 needs at least one continuation"):
        tiny.score(ids, [[[1]], [], [[2]]], mask, _images(cases[:3], pixels))


def test_scores_of_tokens_and_of_empty_prompts(tiny: ParrotForConditionalGeneration) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [1, 1, 1]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    options = [[[8, 9], [10]], [[8, 9], [10, 11, 12]]]
    tokens = tiny.score(ids, options, mask, return_tokens=True, prefix_token_id=30)
    sums = tiny.score(ids, options, mask, prefix_token_id=30)
    with torch.no_grad():
        for row, prompt in enumerate(([5, 6, 7], [30])):
            for own, found, total in zip(options[row], tokens[row], sums[row], strict=True):
                exact = tiny(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
                for place, token in enumerate(own, start=len(prompt) - 1):
                    assert abs(found[place - len(prompt) + 1].logprob - float(exact[place, token])) < 1e-4
                    assert found[place - len(prompt) + 1].is_greedy == (int(exact[place].argmax()) == token)
                assert abs(float(total) - sum(each.logprob for each in found)) < 1e-5
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    alone = tiny.score(nothing, [[[8, 9]]], prefix_token_id=30)
    assert abs(float(alone[0][0]) - float(sums[1][0])) < 1e-5
    assert tiny.score(nothing, [[[8]]])[0].shape == (1,)  # after the token that ends answers


def test_settings_are_checked(tiny: ParrotForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for setting, match in (
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens must be one number or one for each of 1 requests, got 2"),
        ({"do_sample": True, "seed": []}, "seed must be one number or one for each of 1 requests, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be > 0"),
        ({"do_sample": True, "temperature": math.nan}, "temperature must be > 0"),
        ({"do_sample": True, "temperature": math.inf}, "temperature must be > 0"),
        ({"do_sample": True, "temperature": 1e-60}, "temperature must be > 0"),
        ({"top_p": math.nan}, "top_p must be in"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must be > 0"),
        ({"repetition_penalty": 1e60}, "repetition_penalty must be > 0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            tiny.generate(ids, **setting)
    with pytest.raises(DataError, match="600 new tokens it exceeds the 512 positions"):
        tiny.generate(ids, max_new_tokens=600)


def test_first_turn_guides_alike_in_training_and_in_a_later_turn(pixels: Tensor) -> None:
    model, processor = parrot_sys.load_pretrained(FIXTURE / "model")
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A parrot."},
        {"from": "human", "value": "Where does it live?"},
    ]
    trained = processor.format_conversation([*turns, {"from": "gpt", "value": "In a forest."}])
    later = processor.format_conversation(turns, add_generation_prompt=True)["input_ids"]
    first = processor.format_conversation(turns[:1], add_generation_prompt=True)["input_ids"]

    def route(ids: list[int], labels: list[int] | None = None) -> Tensor:
        given = None if labels is None else torch.tensor([labels])
        routing = model(torch.tensor([ids]), images=pixels[:1], labels=given).routing
        assert routing is not None
        return routing.probs

    assert differ(route(later), route(first), atol=1e-6)  # `prompt`: a later question guides as well
    model.model.bridge.model = replace(model.config, moe=replace(model.config.moe, guidance="first_turn"))
    torch.testing.assert_close(route(later), route(first), rtol=0, atol=0)
    torch.testing.assert_close(route(trained["input_ids"], trained["labels"]), route(first), rtol=0, atol=0)
    _, generated = model.generate(torch.tensor([later]), images=pixels[:1], max_new_tokens=2, return_routing=True)
    torch.testing.assert_close(generated.probs, route(first), rtol=0, atol=0)
