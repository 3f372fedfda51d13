"""Checkpoints, requests and right answers for the tests of vLLM's plugin, and the program that asks vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import parrot_sys
from parrot_sys.modules.text_guided_moe import RoutingOutput, RoutingOverride, TextGuidedMoE

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
PICTURES = [str(FIXTURES / "parrot_tiny" / f"image_{i}.png") for i in range(4)]
NEW_TOKENS = 8
LONG = 40
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


def parrot_checkpoint(folder: Path) -> Path:
    """The tiny model with heads as wide as vLLM's CPU engine wants them, and a router that tells `QUESTIONS` apart.

    Rows of its matrix solve `weight @ x_i = OWN_EXPERT * one_hot(i)` for what the router sees of picture 0 under
    question i, so that this picture has another expert for each question.
    """
    model = _copy("parrot_tiny", folder, num_attention_heads=2, num_key_value_heads=2)
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


def wings_checkpoint(folder: Path, *, groups: int = 1) -> Path:
    """The tiny model of Wings with two wide heads, and learners and routers that are heard in the answers.

    Args:
        folder: to be made.
        groups: heads of keys and values; 1 gives the layers' own attention smaller caches than their learners'.
    """
    model = _copy("wings_tiny", folder, num_attention_heads=2, num_key_value_heads=groups)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            tensors[name] = tensors[name][: 32 * groups].clone()
        elif "attn_pool.o_proj.1" in name or "attn_t_pool.o_proj.1" in name:
            tensors[name] *= 8
        elif "reweight_module.linear.weight" in name:
            tensors[name] *= 40
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def _copy(fixture: str, folder: Path, **changes: int) -> Path:
    shutil.copytree(FIXTURES / fixture, folder)
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder / "model"


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


def cases(model: Path) -> list[dict[str, Any]]:
    """Six languages with none, one, two and three pictures, and the pictures in another order."""
    return [request(model, q, images) for q in QUESTIONS for images in ((), (0,), (1, 2), (2, 1), (3, 0, 1))]


def answer(
    model: Path, asked: dict[str, Any], override: RoutingOverride | None = None
) -> tuple[list[int], RoutingOutput | None]:
    """The greedy answer of `parrot_sys`, and the routes."""
    own, processor = reference(model)
    ids, images = asked["own_ids"], asked["images"]
    whole, routing = own.generate(
        torch.tensor([ids]),
        images=processor.images(images) if images else None,
        max_new_tokens=asked["tokens"],
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
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("[{"))  # (the engine logs there as well)
    return json.loads(line)


def check_greedy(model: Path) -> None:
    """Greedy answers to `cases` with caches, again from the caches, and without any."""
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


def check_preempted(model: Path) -> None:
    """Long answers to all `cases` at once with a cache that holds a few of them."""
    asked = [{**each, "tokens": LONG} for each in cases(model)]
    small = {"num_gpu_blocks_override": 20, "max_model_len": 256, "disable_log_stats": False}
    (got,) = run(model, [asked], options={**CACHED, **small})
    assert got["preempted"], "there was not enough room"
    assert got["tokens"] == expected(model, asked)
