"""lmms-eval with the model `parrot` on tasks from tables: the answers and verdicts of `parrot eval`, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parrot_sys.engine.requests import EngineRequest
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.integrations.lmms_eval.tables import circular_accuracy, write_tasks
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.evaluation.tables import write_table
from tests.integrations.kit_tables import MODEL, NEW_TOKENS, table
from tests.integrations.task_settings import expected_sampling, settings_of_tasks

ROOT = Path(__file__).parents[2]


def run(command: list[str], folder: Path, extra: Path | None = None) -> None:
    paths = [os.environ.get("PYTHONPATH", ""), str(extra or "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def entry_point(folder: Path) -> Path:
    """A folder with the entry point of pyproject.toml, whether the package is installed or not."""
    group = "lmms_eval.models"
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"][group]
    info = folder / "parrot_entry-0.dist-info"
    info.mkdir(parents=True)
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot-entry\nVersion: 0\n")
    return folder


def test_answers_and_verdicts_are_those_of_parrot_eval(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="runs in an environment of its own: make test-integrations")
    tables = [table(tmp_path / "tables" / f"MMMB_{language}.tsv") for language in ("en", "tr")]
    run(["parrot_sys.integrations.lmms_eval", "--output", "tasks", "tables"], tmp_path)
    for task in (tmp_path / "tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("max_new_tokens: 512", f"max_new_tokens: {NEW_TOKENS}"))
    asked = ["--model", "parrot", "--model_args", f"pretrained={MODEL},device=cpu", "--batch_size", "4"]
    tasks = ["--include_path", "tasks", "--tasks", "mmmb_en,mmmb_tr", "--log_samples", "--output_path", "theirs"]
    run(["lmms_eval", *asked, *tasks], tmp_path, entry_point(tmp_path / "entry"))
    own = ["--checkpoint", str(MODEL), "--output", "ours", "--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"]
    run(["parrot_sys", "eval", *own, "--data", "tables"], tmp_path)
    results = json.loads(next((tmp_path / "theirs").rglob("*_results.json")).read_text())["results"]
    rights = set()
    for file in tables:
        name = file.stem.lower()
        lines = next((tmp_path / "theirs").rglob(f"*samples_{name}.jsonl")).read_text().splitlines()
        samples: list[dict[str, Any]] = [json.loads(line) for line in lines]
        lines = next((tmp_path / "ours").rglob(f"*_{file.stem}.jsonl")).read_text().splitlines()
        responses = {record["index"]: record["response"] for record in map(json.loads, lines) if "index" in record}
        assert len(samples) == len(responses) == 6
        assert {own["accuracy"]["index"]: own["filtered_resps"] for own in samples} == responses
        (part,) = json.loads(next((tmp_path / "ours").rglob(f"*_{file.stem}.scores.json")).read_text())[
            "parts"
        ].values()
        verdicts = {own["accuracy"]["index"]: own["accuracy"]["right"] for own in samples}
        assert verdicts == dict(zip(part["rows"]["index"], part["rows"]["right"], strict=True))
        rights |= set(verdicts.values())
        for ours, theirs in (("plain", "accuracy"), ("circular", "circular_accuracy")):
            assert results[name][f"{theirs},none"] * 100 == pytest.approx(part["scores"][ours])
    assert rights == {True, False}


def test_a_question_counts_once_where_its_options_go_round() -> None:
    rows = [{"group": 1, "right": True}, {"group": 1, "right": False}, {"group": 2, "right": True}]
    assert circular_accuracy(rows) == 0.5


def test_tables_that_cannot_be_tasks_are_refused(tmp_path: Path) -> None:
    bare = write_table(tmp_path / "MMMB_en.tsv", [{"index": 1, "question": "a", "A": "b", "B": "c"}])
    with pytest.raises(DataError, match="answers"):
        write_tasks([bare], tmp_path / "tasks")


def kit() -> Any:
    return pytest.importorskip("lmms_eval", reason="runs in an environment of its own: make test-integrations")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    kit()
    from parrot_sys.integrations.lmms_eval.lmms_eval_model import ParrotLMM

    yield ParrotLMM(pretrained=str(MODEL), device="cpu", dtype="auto", batch_size="auto")
    shutdown()


def asked(model: Any, settings: dict[str, Any]) -> EngineRequest:
    """The request for a question without a picture."""
    model.task_dict = {"task": {"test": [{}]}}
    request: EngineRequest = model._request("a", settings, lambda document: [], 0, "task", "test")
    return request


def test_automatic_arguments_are_taken_and_others_named(model: Any) -> None:
    assert model.batch_size == 8
    assert next(model.model.parameters()).dtype == torch.float32
    with pytest.raises(ConfigError, match="batch_size must be >= 1 or auto, got some"):
        type(model)(pretrained=str(MODEL), device="cpu", batch_size="some")


def test_settings_of_all_tasks_are_taken_or_are_known_to_be_refused(model: Any) -> None:
    found = settings_of_tasks(Path(kit().__file__).parent / "tasks")
    assert len(found) > 500
    distinct = {json.dumps(settings, sort_keys=True): file for file, settings in found.items()}
    for text, file in distinct.items():
        settings = json.loads(text)
        if (expected := expected_sampling(settings)) is not None:
            assert asked(model, settings).sampling == expected, file
            continue
        with pytest.raises(ConfigError, match="generation_kwargs"):
            asked(model, settings)


def test_stop_strings_are_those_of_the_kits_own_models(model: Any) -> None:
    """lmms-eval adds the delimiter of examples to tasks without stop strings, and its own models leave it out."""
    assert asked(model, {"until": ["\n\n"]}).stop_strings == ()
    assert asked(model, {"until": ["Q:", "\n\n"]}).stop_strings == ("Q:",)
    assert asked(model, {"until": "\n\n"}).stop_strings == ()
    assert asked(model, {"until": None, "image_aspect_ratio": "pad"}).stop_strings == ()


def test_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    tables = [table(tmp_path / folder / "MMMB_en.tsv") for folder in ("a", "b")]
    with pytest.raises(DataError, match=r"mmmb_en.*a/MMMB_en\.tsv.*b/MMMB_en\.tsv"):
        write_tasks(tables, tmp_path / "tasks")
    tables[1].rename(other := tmp_path / "mmmb_EN.tsv")
    with pytest.raises(DataError, match="mmmb_en"):
        write_tasks([tables[0], other], tmp_path / "tasks")


@pytest.mark.parametrize("name", ["a,b", "a b", "b*", "[ab]"])
def test_names_that_the_kit_would_read_otherwise_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="letters, digits"):
        write_tasks([table(tmp_path / f"{name}.tsv")], tmp_path / "tasks")


@pytest.mark.parametrize("name", ["1234", "yes", "null", "1e3", "фрукты"])
def test_names_stay_texts(tmp_path: Path, name: str) -> None:
    (written,) = write_tasks([table(tmp_path / f"{name}.tsv")], tmp_path / "tasks")
    text = (tmp_path / "tasks" / f"{name}.yaml").read_text(encoding="utf-8").replace("!function", "")
    task = yaml.safe_load(text)
    assert written == name == task["task"]
    assert task["dataset_kwargs"]["data_files"]["test"] == f"{name}.jsonl"
    assert task["generation_kwargs"]["until"] == []


def test_names_of_the_kits_own_tasks_are_refused(tmp_path: Path) -> None:
    """Its own would run instead."""
    kit()
    with pytest.raises(DataError, match="lmms-eval has a task mmstar of its own"):
        write_tasks([table(tmp_path / "MMStar.tsv")], tmp_path / "tasks")
