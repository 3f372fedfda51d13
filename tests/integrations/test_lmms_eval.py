"""lmms-eval with the model `parrot` on tasks from tables: the answers and verdicts of `parrot eval`, row by row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.errors import DataError
from parrot_sys.integrations.lmms_eval.tables import circular_accuracy, write_tasks
from tests.evaluation.tables import write_table
from tests.integrations.kit_tables import MODEL, NEW_TOKENS, table

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
    rights = set()
    for file in tables:
        lines = next((tmp_path / "theirs").rglob(f"*samples_{file.stem.lower()}.jsonl")).read_text().splitlines()
        samples: list[dict[str, Any]] = [json.loads(line) for line in lines]
        lines = next((tmp_path / "ours").rglob(f"*_{file.stem}.jsonl")).read_text().splitlines()
        records = {record["index"]: record for record in map(json.loads, lines) if "index" in record}
        assert len(samples) == len(records) == 6
        scores = json.loads(next((tmp_path / "ours").rglob(f"*_{file.stem}.scores.json")).read_text())
        for sample in samples:
            verdict = sample["accuracy"]
            assert sample["filtered_resps"] == records[verdict["index"]]["response"]
            rights.add(verdict["right"])
        assert sum(sample["accuracy"]["right"] for sample in samples) / 6 * 100 == pytest.approx(_accuracy(scores))
    assert rights == {True, False}


def _accuracy(scores: dict[str, Any]) -> float:
    (part,) = scores["parts"].values()
    return float(part["scores"]["plain"])


def test_a_question_counts_once_where_its_options_go_round() -> None:
    rows = [{"group": 1, "right": True}, {"group": 1, "right": False}, {"group": 2, "right": True}]
    assert circular_accuracy(rows) == 0.5


def test_tables_that_cannot_be_tasks_are_refused(tmp_path: Path) -> None:
    bare = write_table(tmp_path / "MMMB_en.tsv", [{"index": 1, "question": "a", "A": "b", "B": "c"}])
    with pytest.raises(DataError, match="answers"):
        write_tasks([bare], tmp_path / "tasks")
