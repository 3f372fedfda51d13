"""Wings in vLLM, by the paper's rule: greedy answers are those of `parrot_sys` on the same exported checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.integrations.vllm_cases import (
    CACHED,
    QUESTIONS,
    check_greedy,
    check_preempted,
    expected,
    program,
    request,
    run,
    wings_checkpoint,
)

pytest.importorskip("parrot_vllm", reason="runs in an environment of its own: make test-vllm")

PARTS = {"visual learners": "attn_pool.o_proj.1", "textual learners": "attn_t_pool.o_proj.1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wings_checkpoint(tmp_path_factory.mktemp("vllm") / "wings")


def changed(model: Path, folder: Path, part: str, factor: float) -> Path:
    """The checkpoint with some tensors multiplied."""
    shutil.copytree(model.parent, folder)
    tensors = load_file(folder / "model" / "model.safetensors")
    for name in tensors:
        if part in name:
            tensors[name] *= factor
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder / "model"


def test_greedy_answers_are_those_of_parrot_sys_with_and_without_caches(model: Path) -> None:
    check_greedy(model)


def test_preempted_requests_get_the_same_answers(model: Path) -> None:
    check_preempted(model)


@pytest.mark.parametrize("part", [*PARTS.values(), "reweight_module.linear.weight"])
def test_answers_depend_on_each_part(model: Path, part: str, tmp_path: Path) -> None:
    """What the test above rests on, by `parrot_sys` alone."""
    without = changed(model, tmp_path / "without", part, 0.0)
    requests = [request(model, question, (0,)) for question in QUESTIONS]
    assert expected(without, requests) != expected(model, requests)


def same_words(model: Path) -> list[list[dict[str, object]]]:
    """The same words without and with a picture behind the first blocks, one request at a time."""
    requests = [request(model, question, images) for question in QUESTIONS for images in ((), (0,))]
    return [[each] for each in requests]


def test_requests_with_pictures_do_not_share_the_first_blocks_of_those_without(model: Path) -> None:
    asked = same_words(model)
    wanted = [expected(model, each) for each in asked]
    rounds = run(model, asked, options=CACHED)
    assert [each["tokens"] for each in rounds] == wanted
    cached = [each["cached"][0] for each in rounds]
    assert not any(cached[:2]), "the first of each kind finds nothing"
    assert all(cached[2:]), "but all others the system's words of their kind"
    salted = [[{**each, "salt": "a customer's"} for each in requests] for requests in asked]
    rounds = run(model, salted, options=CACHED)
    assert [each["tokens"] for each in rounds] == wanted
    assert not any(each["cached"][0] for each in rounds[:2]), "nor where the request has a salt of its own"


def test_with_shared_first_blocks_answers_are_wrong(model: Path) -> None:
    """The check above sees what it looks for."""
    asked = same_words(model)
    rounds = run(model, asked, options=CACHED, one_salt=True)
    assert rounds[1]["cached"][0]
    assert [each["tokens"] for each in rounds] != [expected(model, each) for each in asked]


def first_stage(model: Path) -> None:
    """Takes the routers out of a checkpoint."""
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".reweight_module." not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def equal_weights(model: Path) -> None:
    """Has the learners added alike."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"parrot_sys": {"wings": {"routing": "even"}}}))


@pytest.mark.parametrize("change", [first_stage, equal_weights])
def test_checkpoints_that_use_no_router(model: Path, change: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(model.parent, tmp_path / "changed")
    without = tmp_path / "changed" / "model"
    change(without)
    asked = [request(without, question, images) for question in QUESTIONS for images in ((), (0,), (2, 1))]
    wanted = expected(without, asked)
    assert wanted != expected(model, asked)
    (got,) = run(without, [asked], options=CACHED)
    assert got["tokens"] == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parrot_sys": {"wings": {"rule": "released"}}}, "wings.rule='released': earlier rows read later ones"),
        (
            {"parrot_sys": {"wings": {"router_positions": 256}}, "tokenizer_max_length": 256},
            "weights for 256 positions, but requests may have 512: start with --max-model-len 256",
        ),
    ],
)
def test_what_the_learners_cannot_do_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(model.parent, tmp_path / "changed")
    file = tmp_path / "changed" / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    done = program({"model": str(file.parent), "rounds": []})
    assert done.returncode
    assert message in done.stdout + done.stderr
