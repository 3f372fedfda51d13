"""The stage `end_to_end` at toy size: each code learns and answers, with figures."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.gpu_suite import end_to_end
from benchmarks.gpu_suite.__main__ import main
from parrot_sys.systems.config import ParrotConfig


def test_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert main(["end_to_end", "--json", str(path), "--device", "cpu"]) == 0
    rows = json.loads(path.read_text())["stages"]["end_to_end"]["rows"]
    assert list(rows) == end_to_end.rows("cpu")
    for name, row in rows.items():
        assert row["status"] == "passed", name
        assert row["tokens_per_second"] > 0
        assert row["layers"] == end_to_end.model_config(torch.device("cpu")).llm.num_layers
        if name.startswith("train/"):
            first, *_, last = row["losses"]
            assert last < first, f"{name}: the same batch again and again must be learned"
    counts = {row["rows_a_step"] for name, row in rows.items() if name.startswith("train/")}
    assert len(counts) == 1  # all take the same rows


def test_as_many_layers_as_fit() -> None:
    model = ParrotConfig()
    layers = [end_to_end.layers_that_fit(gigabytes * 10**9, model) for gigabytes in (1, 80, 141, 10**4)]
    assert layers[0] == 1
    assert layers == sorted(layers)
    assert layers[-1] == model.llm.num_layers
