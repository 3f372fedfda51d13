"""The plugin for vLLM, on its CPU engine: greedy answers are those of `parrot_sys` on the same exported checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import parrot_sys
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride, TextGuidedMoE
from parrot_sys.systems.registry import RELEASED_TYPES

pytest.importorskip("parrot_vllm", reason="runs in an environment of its own: make test-vllm")

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PICTURES = [str(FIXTURES / "parrot_tiny" / f"image_{i}.png") for i in range(4)]
NEW_TOKENS = 8
OWN_EXPERT = 6.0  # logit of the expert that a question prefers; the others have 0
CACHED = {"enable_prefix_caching": True, "block_size": 32}  # its CPU engine takes 128 rows a block otherwise
QUESTIONS = (
    "What is in the picture?",
    "图片里有什么",
    "O que há na imagem?",
    "ماذا يوجد في الصورة؟",
    "Resimde ne var?",
    "Что на картинке?",
)
SYSTEM = {"from": "system", "value": "Answer briefly. " * 6}


def checkpoint(folder: Path) -> Path:
    """The tiny model with heads as wide as vLLM's CPU engine wants them, and a router that tells `QUESTIONS` apart.

    Rows of its matrix solve `weight @ x_i = OWN_EXPERT * one_hot(i)` for what the router sees of picture 0 under
    question i, so that this picture has another expert for each question.
    """
    shutil.copytree(FIXTURES / "parrot_tiny", folder)
    model = folder / "model"
    config = json.loads((model / "config.json").read_text())
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if ".experts." in name:
            tensors[name] *= 3  # so that the choice of an expert is seen in the answer
        elif "mm_projector" in name:
            tensors[name] *= 1.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    seen = router_inputs(*parrot_sys.load_pretrained(model, dtype="float32"))
    tensors["model.moe_model.gate.weight"] = (OWN_EXPERT * torch.linalg.pinv(seen.double()).T).float().contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@torch.no_grad()
def router_inputs(own: Any, processor: Any) -> Tensor:
    """[6, H], the attended text of picture 0 under each of `QUESTIONS`."""
    (moe,) = (module for module in own.modules() if isinstance(module, TextGuidedMoE))
    calls: list[tuple[Any, ...]] = []
    handle = moe.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    for question in QUESTIONS:
        ids = processor.format_conversation(turns(question, (0,)), add_generation_prompt=True)["input_ids"]
        own(torch.tensor([ids]), images=processor.images(PICTURES[:1]))
    handle.remove()
    return torch.cat([moe.attention(features[:, 0], text) @ text for features, text, *_ in calls])


@cache
def reference(model: Path) -> Any:
    return parrot_sys.load_pretrained(model, dtype="float32")


def turns(question: str, images: Sequence[int]) -> list[dict[str, str]]:
    return [SYSTEM, {"from": "human", "value": "<image>\n" * len(images) + question}]


def request(model: Path, question: str, images: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
    """A request for the program, with the ids that `parrot_sys` makes of it under `ids`."""
    made = reference(model)[1].format_conversation(turns(question, images), add_generation_prompt=True)
    return {
        "prompt": made["prompt"],
        "own_ids": made["input_ids"],
        "images": [PICTURES[i] for i in images],
        "tokens": NEW_TOKENS,
        **fields,
    }


def answer(
    model: Path, asked: dict[str, Any], override: RoutingOverride | None = None
) -> tuple[list[int], RoutingOutput | None]:
    """The greedy answer of `parrot_sys`, and the routes."""
    own, processor = reference(model)
    ids, images = asked["own_ids"], asked["images"]
    whole, routing = own.generate(
        torch.tensor([ids]),
        images=processor.images(images) if images else None,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[],
        routing_override=override,
        return_routing=True,
    )
    return whole[0, len(ids) :].tolist(), routing


def expected(model: Path, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [answer(model, each)[0] for each in requests]


def program(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    file = ROOT / "tests" / "integrations" / "vllm_program.py"
    return subprocess.run([sys.executable, file], input=json.dumps(asked), capture_output=True, text=True)


def run(model: Path, rounds: Sequence[Sequence[dict[str, Any]]], **asked: Any) -> list[dict[str, Any]]:
    """What the program says of each round."""
    done = program({"model": str(model), "rounds": rounds, **asked})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("vllm") / "parrot")


def cases(model: Path) -> list[dict[str, Any]]:
    """Six languages with none, one, two and three pictures, and the pictures in another order."""
    return [request(model, q, images) for q in QUESTIONS for images in ((), (0,), (1, 2), (2, 1), (3, 0, 1))]


def test_greedy_answers_are_those_of_parrot_sys_with_and_without_caches(model: Path) -> None:
    asked = cases(model)
    wanted = expected(model, asked)
    assert len({tuple(each) for each in wanted}) > len(wanted) // 2, "the answers tell requests apart"
    first, again = run(model, [asked, asked], options={**CACHED, "max_num_batched_tokens": 128})
    assert first["tokens"] == wanted
    assert again["tokens"] == wanted
    assert sum(again["cached"]) > sum(first["cached"]) >= 0, "the second round finds its prompts in the cache"
    (plain,) = run(model, [asked], options={"enable_prefix_caching": False})
    assert plain["tokens"] == wanted
    assert not sum(plain["cached"])


def same_picture(model: Path) -> list[list[dict[str, Any]]]:
    """One picture under one prompt after the other, one request at a time."""
    return [[request(model, question, (0,))] for question in (*QUESTIONS, *QUESTIONS)]


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


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        (FIXTURES / "wings_tiny" / "model" / "config.json", "wings is missing: its learners"),
        ({"model_type": "wings_llama", "hidden_size": 64}, "wings is missing: its learners"),
        ({"model_type": "multimodal_gpt", "hidden_size": 64}, "multimodal_gpt is missing: its gated cross-attention"),
    ],
)
def test_checkpoints_of_other_systems_are_refused_with_what_is_missing(
    fields: Path | dict[str, Any], missing: str, tmp_path: Path
) -> None:
    from parrot_vllm import register
    from transformers import AutoConfig

    register()
    text = fields.read_text() if isinstance(fields, Path) else json.dumps(fields)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"parrot-vllm serves parrot_.*{missing}.*parrot serve"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_engine_says_so_too(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "wings_tiny" / "model", tmp_path / "model")
    done = program({"model": str(tmp_path / "model"), "rounds": []})
    assert done.returncode
    assert "wings is missing: its learners" in done.stdout + done.stderr


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
