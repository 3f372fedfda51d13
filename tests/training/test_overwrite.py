"""Commands with --overwrite or --force keep what is there until the new is complete, and clean up after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.corpora.default import build as building
from parrot_sys.data.corpora.public import importing
from parrot_sys.evaluation import main as evaluation
from parrot_sys.evaluation import runner
from parrot_sys.inference import convert as converting
from parrot_sys.systems import export
from parrot_sys.testing.distributed import run_distributed
from tests.evaluation.tables import write_table
from tests.training.tiny import MODEL

Step = Callable[[Path, bool], Any]
"""Called with a working folder and whether other settings than at the first time are meant."""


def _convert(folder: Path, other: bool) -> None:
    dtype = "bfloat16" if other else "float32"
    output = folder / "out"
    converting.main(["--checkpoint", str(MODEL), "--output", str(output), "--dtype", dtype, "--force"])


def _convert_to_training(folder: Path, other: bool) -> None:
    dtype = "bfloat16" if other else "float32"
    arguments = ["--checkpoint", str(MODEL), "--output", str(folder / "out"), "--dtype", dtype, "--force"]
    converting.main([*arguments, "--format", "megatron"])


def _build(folder: Path, other: bool) -> None:
    building.build(
        building.DataBuildConfig(
            output=folder / "out",
            concepts=12,
            held_out=4,
            languages=("en",),
            vocab_size=1024,
            image_size=32,
            variants=1,
            text_rounds=1,
            instruct_rounds=1,
            seed=int(other),
            overwrite=True,
        )
    )


def _import(folder: Path, other: bool) -> None:
    rows = [{"instruction": "?", "input": "", "output": "other" if other else "one"}]
    (folder / "in.json").write_text(json.dumps(rows))
    importing.import_set(
        importing.DataImportConfig(
            source="alpaca", input=folder / "in.json", output=folder / "out" / "records.json", overwrite=True
        )
    )


def _evaluate(folder: Path, other: bool) -> None:
    rows = [{"index": i, "question": "?", "A": "a", "B": "b", "answer": "A", "category": "c"} for i in range(3)]
    table = write_table(folder / "MMMB_en.tsv", rows)
    arguments = ["--checkpoint", str(MODEL), "--data", str(table), "--output", str(folder / "out"), "--batch-size", "1"]
    evaluation.main([*arguments, "--mode", "text-likelihood" if other else "likelihood", "--overwrite"])


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_first(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return _die() if calls[0] > 1 else function(*args, **kwargs)

    return call


def _is_temporary(path: Path) -> bool:
    return path.suffix == ".tmp" or (path.name.startswith(".") and path.name not in (".metadata", ".lock"))


@pytest.mark.parametrize(
    ("step", "owner", "name", "late"),
    [
        pytest.param(_convert, export, "write_tensors", False, id="convert"),
        pytest.param(_convert_to_training, converting, "_save_training_checkpoint", False, id="convert-to-training"),
        pytest.param(_build, building, "write_benchmark", False, id="data-build"),
        pytest.param(_import, os, "replace", False, id="data-import"),
        pytest.param(_evaluate, runner.PredictionStore, "add", True, id="eval"),
    ],
)
def test_a_kill_leaves_what_was_there(step: Step, owner: Any, name: str, late: bool, tmp_path: Path) -> None:
    def once(rank: int, size: int, other: bool, kill: bool) -> None:
        if kill:
            setattr(owner, name, _after_first(getattr(owner, name)) if late else _die)
        step(tmp_path, other)

    def held() -> dict[str, bytes]:
        out = tmp_path / "out"
        files = (
            path
            for path in sorted(out.rglob("*"))
            if path.is_file() and not _is_temporary(path) and path.name != ".lock"
        )
        return {str(path.relative_to(out)): path.read_bytes() for path in files}

    run_distributed(once, 1, False, False)
    before = held()
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(once, 1, True, True)
    assert held() == before
    run_distributed(once, 1, True, False)
    assert held() != before
    assert not list(filter(_is_temporary, tmp_path.rglob("*"))), "left-over files"
