"""Steps with stamps: what is done is skipped, what was interrupted goes on, what changed runs again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parrot_sys.errors import CheckpointError
from studies.pipeline import Pipeline, PipelineError, Step
from studies.recipes import strip_experts


class Recorder:
    """Counts calls and appends to a file, so that a kept folder can be told from a new one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = False

    def __call__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("a") as file:
            file.write("x")
        self.calls.append(folder.name)
        if self.fail:
            raise KeyboardInterrupt


def run(root: Path, work: Recorder, first: int = 1, second: int = 1) -> list[Step]:
    pipeline = Pipeline(root, say=lambda line: None)
    a = pipeline.step("a", work, {"value": first})
    b = pipeline.step("seed/b", work, {"value": second}, [a])
    return [a, b]


def test_done_steps_are_skipped(tmp_path: Path) -> None:
    work = Recorder()
    before = run(tmp_path, work)
    after = run(tmp_path, work)
    assert work.calls == ["a", "b"]
    assert [s.key for s in before] == [s.key for s in after]
    assert after[1].seconds == before[1].seconds > 0


def test_changed_settings_run_the_step_and_what_builds_on_it(tmp_path: Path) -> None:
    work = Recorder()
    run(tmp_path, work)
    run(tmp_path, work, second=2)
    assert work.calls == ["a", "b", "b"]
    run(tmp_path, work, first=2, second=2)
    assert work.calls == ["a", "b", "b", "a", "b"]
    assert (tmp_path / "a" / "log").read_text() == "x"  # the old result was removed


def test_interrupted_step_keeps_its_folder(tmp_path: Path) -> None:
    work = Recorder()
    work.fail = True
    with pytest.raises(SystemExit, match="goes on here"):
        run(tmp_path, work)
    work.fail = False
    run(tmp_path, work)
    assert work.calls == ["a", "a", "b"]
    assert (tmp_path / "a" / "log").read_text() == "xx"
    stamp = json.loads((tmp_path / "stamps" / "a.json").read_text())
    assert stamp["done"]


def test_removed_result_runs_again(tmp_path: Path) -> None:
    work = Recorder()
    run(tmp_path, work)
    (tmp_path / "a" / "log").unlink()
    (tmp_path / "a").rmdir()
    run(tmp_path, work)
    assert work.calls == ["a", "b", "a"]


def test_failed_command_names_itself(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, say=lambda line: None)
    pipeline.command([sys.executable, "-c", "pass"])
    with pytest.raises(PipelineError, match=r"exit code 3 of: .*sys\.exit\(3\)"):
        pipeline.command([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_strip_experts(tmp_path: Path) -> None:
    kept = {"model.norm.weight": torch.randn(3)}
    save_file({**kept, "model.moe_model.gate.weight": torch.randn(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"use_moe": true, "num_experts": 2, "parrot_sys": {"moe": {"topk": 2}}}')
    strip_experts(tmp_path)
    left = load_file(tmp_path / "model.safetensors")
    assert left.keys() == kept.keys()
    assert torch.equal(left["model.norm.weight"], kept["model.norm.weight"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"use_moe": False, "parrot_sys": {}}
    with pytest.raises(CheckpointError, match="holds no experts"):
        strip_experts(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="must hold its weights in"):
        strip_experts(tmp_path)
