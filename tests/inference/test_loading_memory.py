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
import torch.distributed as dist
from torch import Tensor

from parrot_sys.config_values import save_config
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.files import read_json
from parrot_sys.megatron.checkpoint.store import save_distributed
from parrot_sys.megatron.runtime.initialize import ParallelConfig, initialize
from parrot_sys.models.checkpoint_files import MODEL_CONFIG, PROCESSOR
from parrot_sys.models.tensor_files import write_tensors
from parrot_sys.systems.build import build_model
from parrot_sys.systems.hf_config import config_from_hf
from parrot_sys.systems.maps import parrot_maps
from parrot_sys.testing.distributed import run_distributed
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
        pytest.param("safetensors", torch.float32, "bfloat16", marks=pytest.mark.slow),
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
    _check_peak(warm_up, model, asked)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        pytest.param("float32", 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_training_checkpoints(asked: str, size: int, tmp_path: Path) -> None:
    """Weights in fp32, saved by one process or by two that share each tensor."""
    small, large = copy_fixture(tmp_path / "small"), copy_fixture(tmp_path / "large")
    change_json(large / "config.json", **SIZES)
    (large / "model.safetensors").unlink()
    outputs = [tmp_path / "small-training", tmp_path / "large-training"]

    def save(rank: int, world_size: int) -> None:
        parallel = initialize(ParallelConfig(tensor_model_parallel_size=world_size))
        for source, output in zip((small, large), outputs, strict=True):
            config = config_from_hf(read_json(source / "config.json"), source)
            model = build_model(config, parallel, dtype=torch.float32, initialize_weights=False)
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.fill_(0.01)
            if rank == 0:
                output.mkdir()
                save_config(config, output / MODEL_CONFIG)
                ParrotProcessor.from_pretrained(small).save_pretrained(output / PROCESSOR)
            dist.barrier()
            save_distributed(output, [model], None, {"step": 0, "world_size": world_size})

    run_distributed(save, size)
    _check_peak(*outputs, asked)


def _check_peak(warm_up: Path, model: Path, asked: str) -> None:
    command = [sys.executable, "-m", "tests.inference.peak_memory", str(warm_up), str(model), asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["weights"] > 1.5e8
    assert measured["peak"] <= MOST * measured["weights"], measured
