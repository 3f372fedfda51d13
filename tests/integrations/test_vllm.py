"""The plugin for vLLM, on its CPU engine: greedy answers are those of `parrot_sys` on the same exported checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import parrot_sys
from parrot_sys.modules.text_guided_moe import RoutingOverride
from parrot_sys.systems.registry import RELEASED_TYPES
from tests.integrations.vllm_cases import (
    CACHED,
    FIXTURES,
    QUESTIONS,
    ROOT,
    answer,
    cases,
    check_greedy,
    check_preempted,
    expected,
    parrot_checkpoint,
    program,
    request,
    run,
)

pytest.importorskip("parrot_vllm", reason="runs in an environment of its own: make test-vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parrot_checkpoint(tmp_path_factory.mktemp("vllm") / "parrot")


def test_greedy_answers_are_those_of_parrot_sys_with_and_without_caches(model: Path) -> None:
    check_greedy(model)


@pytest.mark.parametrize("name", ["demo", "demo-wings"])
def test_greedy_answers_of_a_demo(name: str) -> None:
    """Of a model that has been trained, where `make demo` has left it."""
    folder = ROOT / "runs" / name / "instruct" / "hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is made by make demo")
    asked = cases(folder)
    (got,) = run(folder, [asked], options={**CACHED, "max_num_batched_tokens": 128})
    assert got["tokens"] == expected(folder, asked)


def same_picture(model: Path) -> list[list[dict[str, Any]]]:
    """One picture under one prompt after the other, one request at a time."""
    return [[request(model, question, (0,))] for question in (*QUESTIONS, *QUESTIONS)]


def test_preempted_requests_get_the_same_answers(model: Path) -> None:
    check_preempted(model)


def test_each_prompt_has_a_route_of_its_own_and_the_answer_depends_on_it(model: Path) -> None:
    """What the tests below rest on, by `parrot_sys` alone."""
    requests = [request(model, question, (0,)) for question in QUESTIONS]
    answers, routings = zip(*(answer(model, each) for each in requests), strict=True)
    routes = [routing.probs for routing in routings]
    assert [int(route.argmax()) for route in routes] == list(range(len(QUESTIONS)))
    for i, own in enumerate(requests):
        swapped = [answer(model, own, RoutingOverride(probs=route))[0] == answers[i] for route in routes]
        assert swapped == [i == j for j in range(len(routes))], f"question {i} under the routes of the others"


def test_a_picture_under_another_prompt_is_routed_anew_and_encoded_once(model: Path) -> None:
    asked = same_picture(model)
    rounds = run(model, asked, options=CACHED)
    assert [each["tokens"] for each in rounds] == [expected(model, each) for each in asked]
    counts = [each["encoded"][0] for each in rounds]
    assert len(set(counts)) == 1, f"the tower runs for the first prompt alone, got {counts} pictures encoded"
    assert rounds[len(QUESTIONS)]["cached"][0] > rounds[1]["cached"][0], "the same prompt again is found"


def test_with_the_pictures_own_identity_answers_are_wrong(model: Path) -> None:
    """The check above sees what it looks for: vLLM's usual hash gives a picture the routes of an earlier prompt."""
    asked = same_picture(model)
    rounds = run(model, asked, options=CACHED, image_identity=True)
    wrong = [each["tokens"] != expected(model, own) for each, own in zip(rounds, asked, strict=True)]
    assert not wrong[0]
    assert any(wrong[1:])


def test_prompts_with_another_number_of_places_are_refused(model: Path) -> None:
    from parrot_vllm.checkpoint import open_checkpoint

    own = open_checkpoint(str(model))
    ids = request(model, QUESTIONS[0], (0, 1))["own_ids"]
    assert own.prompt_ids(ids, 2) == [own.marker if i == -200 else i for i in ids]
    text = request(model, QUESTIONS[1], (0, 1))
    assert own.prompt_ids(text["prompt"], 2) == own.prompt_ids(text["own_ids"], 2)
    with pytest.raises(parrot_sys.errors.DataError, match="2 times <image> for 3 pictures"):
        own.prompt_ids(text["prompt"], 3)


def test_multimodal_gpt_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    from parrot_vllm import register
    from transformers import AutoConfig

    register()
    shutil.copytree(FIXTURES / "parrot_tiny" / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "multimodal_gpt", "hidden_size": 64}))
    missing = "multimodal_gpt is missing: its gated cross-attention"
    with pytest.raises(ValueError, match=rf"parrot-vllm serves parrot_.*wings_.*{missing}.*parrot serve"):
        AutoConfig.from_pretrained(tmp_path / "model")
    done = program({"model": str(tmp_path / "model"), "rounds": []})
    assert done.returncode
    assert missing in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_layouts_that_vllm_has_itself_are_left_to_it(kind: str) -> None:
    from parrot_vllm import register
    from parrot_vllm.config import CONFIGURATIONS
    from transformers import AutoConfig

    register()
    assert kind in RELEASED_TYPES
    assert kind not in CONFIGURATIONS
    assert type(AutoConfig.for_model(kind)).__module__.startswith("transformers.")


def test_routes_that_a_part_of_the_prompt_guides_are_refused(model: Path) -> None:
    from parrot_vllm.checkpoint import open_checkpoint
    from parrot_vllm.visual import Visual

    config = open_checkpoint(str(model)).config
    with pytest.raises(parrot_sys.errors.ConfigError, match="first_turn"):
        Visual(replace(config, moe=replace(config.moe, guidance="first_turn")), torch.float32, 0)
