"""The plugin for vLLM on two processes: greedy answers are those of `parrot_sys`, whatever the processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.vllm_cases import CACHED, cases, expected, parrot_checkpoint, program, run, wings_checkpoint

pytest.importorskip("parrot_vllm", reason="runs in an environment of its own: make test-vllm")

COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor, pictures shared out": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
    "pipeline": {"pipeline_parallel_size": 2, **COMPILED},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vllm")
    return {
        "parrot": parrot_checkpoint(folder / "parrot"),
        "wings": wings_checkpoint(folder / "wings", groups=2),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("system", ["parrot", "wings"])
def test_answers_of_two_processes_are_those_of_one(models: dict[str, Path], system: str, layout: str) -> None:
    model = models[system]
    asked = cases(model)
    wanted = expected(model, asked)
    options = {**CACHED, **LAYOUTS[layout], "max_num_batched_tokens": 128}
    first, again = run(model, [asked, asked], options=options)
    assert first["tokens"] == wanted
    assert again["tokens"] == wanted
    assert sum(again["cached"]) > sum(first["cached"])


def test_stages_without_a_trial_run_are_refused(models: dict[str, Path]) -> None:
    done = program({"model": str(models["parrot"]), "rounds": [], "options": {"pipeline_parallel_size": 2}})
    assert done.returncode
    assert "a trial run, which it leaves out under enforce_eager" in done.stdout + done.stderr
