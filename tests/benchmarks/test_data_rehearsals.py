"""The rehearsals of the data path in a small form: they run to their end, and their checks hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data_sets
from benchmarks.harness import ROOT


def _run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, check=True, timeout=600)


@pytest.mark.slow
def test_training_goes_on_after_a_kill_from_a_generated_set(tmp_path: Path) -> None:
    options = ["--folder", tmp_path, "--records", 24_576, "--pictures", 20, "--ranks", 2, "--steps", 4, "--workers", 1]
    for step in ("generate", "million", "index", "start", "train"):
        _run("benchmarks.bench_data_scale", *options, "--only", step)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (
        figures["index"]["records"] == figures["start"]["records"] == figures["million"]["start"]["records"] == 24_576
    )
    assert figures["index"]["records_kept_from_the_killed_build"] > 0
    assert figures["train"]["bit_equal"]
    assert figures["train"]["resumed"]["last_step"] == 4


def test_generated_records_depend_on_seed_and_number_only() -> None:
    whole = list(data_sets.records(4100, pictures=9))
    assert list(data_sets.records(4, pictures=9, start=4096)) == whole[4096:]
    assert list(data_sets.records(4, pictures=9, seed=1)) != whole[:4]


@pytest.mark.slow
def test_all_loaders_make_the_same_batches(tmp_path: Path) -> None:
    for name in ("datasets", "megatron.energon", "skimage"):
        pytest.importorskip(name, exc_type=ImportError)
    result = tmp_path / "loader.json"
    _run("benchmarks.bench_loader", "--folder", tmp_path / "data", "--samples", 32, "--steps", 3, "--json", result)
    rows = json.loads(result.read_text())
    assert rows["did_not_run"] == {}
    assert rows["equal_samples"] == [32] * 3
    assert [row["workers"] for row in rows["threads_and_processes"]] == [1, 1, 2, 2]
    assert rows["steps"]["sleeps"]["steps"] == rows["steps"]["needs_the_interpreter"]["steps"] == 3
