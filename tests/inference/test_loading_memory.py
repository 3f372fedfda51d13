"""Loading needs little more memory than the weights, whatever the format and the dtype of the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parrot_sys.files import read_json
from parrot_sys.models.hf_checkpoint import parrot_maps
from parrot_sys.models.hf_config import config_from_hf
from parrot_sys.models.tensor_files import write_tensors
from tests.foreign_files import change_json, copy_fixture

ROOT = Path(__file__).parents[2]
MOST = 1.15
"""Peak memory over that of the weights."""
SIZES = {
    "hidden_size": 512,
    "moe_hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 40_000,
}
"""A model of 330 MB in fp32: a third of it embeddings, the rest in packed (q, k, v; gate, up) and plain tensors."""


def _tensors(model: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    config = config_from_hf(read_json(model / "config.json"), model)
    for entry in parrot_maps(config, with_vision_tower=False):
        for key, shape in zip(entry.keys, entry.shapes, strict=True):
            yield key, torch.full(shape, 0.01, dtype=dtype)


@pytest.mark.parametrize(
    ("layout", "stored", "asked"),
    [
        pytest.param("safetensors", torch.bfloat16, "bfloat16", marks=pytest.mark.slow),
        ("safetensors", torch.float32, "bfloat16"),
        pytest.param("sharded", torch.bfloat16, "float32", marks=pytest.mark.slow),
        pytest.param("bin", torch.float32, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_peak_memory(layout: str, stored: torch.dtype, asked: str, tmp_path: Path) -> None:
    warm_up = copy_fixture(tmp_path / "small")
    model = copy_fixture(tmp_path / "large")
    change_json(model / "config.json", **SIZES)
    (model / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(dict(_tensors(model, stored)), model / "pytorch_model.bin")
    else:
        write_tensors(_tensors(model, stored), model, max_shard_bytes=5 * 10**7 if layout == "sharded" else 10**9)
    command = [sys.executable, "-m", "tests.inference.peak_memory", str(warm_up), str(model), asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["weights"] > 1.5e8
    assert measured["peak"] <= MOST * measured["weights"], measured
