"""Megatron-Bridge on Megatron-Core 0.19, Transformer Engine reduced to its names: conversion, and training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import parrot_sys
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.foreign_files import copy_fixture
from tests.integrations.peer_suite import checkout

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "parrot_tiny"
pytest.importorskip("omegaconf", reason="make test-integrations ARGS=megatron_bridge")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages of release 0.19 alone: beside them is a package `tests`, which would hide ours."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "megatron").mkdir()
    for name in ("core", "training"):
        (folder / "megatron" / name).symlink_to(checkout("0.19.0") / "megatron" / name)
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_fixture(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def wanted(directory: Path) -> list[float]:
    """Losses of three steps of Adam over four records, in plain PyTorch on the model of `load_pretrained`."""
    model, processor = parrot_sys.load_pretrained(directory)
    records = json.loads((FIXTURE / "conversations.json").read_text(encoding="utf-8"))[:4]
    encoded = [processor.format_conversation(record["conversations"]) for record in records]
    ids, labels, mask = (
        pad_sequence([torch.tensor(values) for values in rows], batch_first=True, padding_value=filler)
        for rows, filler in (
            ([each["input_ids"] for each in encoded], 0),
            ([each["labels"] for each in encoded], -100),
            ([[1] * len(each["input_ids"]) for each in encoded], 0),
        )
    )
    pictures = processor.images([FIXTURE / f"image_{record['image']}.png" for record in records])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, attention_mask=mask, images=pictures, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss))
    shutdown()
    return losses


def run(core: Path, program: str, *arguments: object, processes: int = 1) -> str:
    """The last line that a program of this folder prints."""
    site = Path(sys.executable).parents[1] / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    paths = [ROOT, ROOT / "kernels", core, site]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # (Megatron-LM's make calls python3)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "PATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(29900 + os.getpid() % 90), "-m", f"tests.integrations.{program}"]
    result = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("experts", "expert_tensor", "stages"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
)
def test_a_hugging_face_model_goes_in_and_out(
    core: Path, experts: int, expert_tensor: int, stages: int, tmp_path: Path
) -> None:
    processes = experts * expert_tensor * stages
    said = run(core, "bridge_program", tmp_path, experts, expert_tensor, stages, processes=processes)
    found = re.fullmatch(r"logits (\S+), (\d+) of (\d+) tensors bit-equal, (\d+) exported", said)
    assert found is not None, said
    assert float(found[1]) < 2e-6
    assert found[2] == found[3] == found[4]


def test_the_documented_lines_run_as_they_stand(core: Path, tmp_path: Path) -> None:
    assert run(core, "bridge_snippet_program", tmp_path) == "45 of 45 tensors bit-equal"


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 2)])
def test_its_training_loop_trains_our_models(
    core: Path, directory: Path, wanted: list[float], tensor: int, stages: int
) -> None:
    said = run(core, "bridge_training_program", directory, tensor, stages, processes=tensor * stages)
    assert [float(loss) for loss in said.split()] == pytest.approx(wanted, abs=2e-5)


def test_checkpoints_with_all_experts_in_one_tensor_are_refused_by_name(core: Path) -> None:
    both = run(core, "bridge_refusal_program").split(" | ")
    assert [said.partition(":")[0] for said in both] == [
        f"decoder.layers.0.mlp.experts.{name}" for name in ("w_down", "w_gate_up")
    ]
    assert all("Megatron's own experts" in said and "model.layers.0.mlp.experts." in said for said in both)
