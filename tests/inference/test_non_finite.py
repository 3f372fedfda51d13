"""Checkpoints with NaN or infinite weights: named when they are loaded, loaded only where that is allowed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import parrot_sys
from parrot_sys.__main__ import main
from parrot_sys.errors import CheckpointError
from parrot_sys.inference.convert import ConvertConfig, convert
from parrot_sys.megatron.runtime.initialize import shutdown
from tests.foreign_files import FIXTURE, copy_fixture

KEYS = sorted(load_file(FIXTURE / "model" / "model.safetensors"))


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


def _spoil(file: Path, key: str, places: list[int], value: float) -> None:
    tensors = load_file(file)
    tensors[key].view(-1)[places] = value
    save_file(tensors, file, metadata={"format": "pt"})


@given(
    key=st.sampled_from(KEYS),
    places=st.sets(st.integers(0, 15), min_size=1),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([None, "bfloat16"]),
)
@settings(max_examples=8, deadline=None)
def test_released_layout(
    key: str, places: set[int], value: float, dtype: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = copy_fixture(tmp_path_factory.mktemp("spoiled"))
    _spoil(model / "model.safetensors", key, sorted(places), value)
    with pytest.raises(CheckpointError, match=rf"{model} holds NaN .* in 1 tensors: {key} \({len(places)}\);"):
        parrot_sys.load_pretrained(model, dtype=dtype)
    parrot_sys.load_pretrained(model, dtype=dtype, allow_non_finite=True)


def test_a_dtype_that_is_too_narrow_and_a_tower_beside_the_model(tmp_path: Path) -> None:
    model = copy_fixture(tmp_path)
    _spoil(model / "model.safetensors", "model.norm.weight", [3], 1e30)
    parrot_sys.load_pretrained(model)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(1\); .* another dtype where theirs is too narrow"):
        parrot_sys.load_pretrained(model, dtype="float16")
    kept = {key: tensor for key, tensor in load_file(model / "model.safetensors").items() if "vision_tower" not in key}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    tower = tmp_path / "clip-vit-tiny" / "model.safetensors"
    key = next(key for key in load_file(tower) if key.endswith("pre_layrnorm.bias"))
    _spoil(tower, key, [0, 1], math.nan)
    with pytest.raises(CheckpointError, match=rf"in 1 tensors: {key} \(2\)"):
        parrot_sys.load_pretrained(model)


def test_training_checkpoints_and_every_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = copy_fixture(tmp_path)
    _spoil(model / "model.safetensors", "model.norm.weight", [0, 1, 2], math.nan)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(3\)"):
        convert(ConvertConfig(checkpoint=model, output=tmp_path / "out"))
    convert(ConvertConfig(checkpoint=model, output=tmp_path / "out", format="megatron", allow_non_finite=True))
    with pytest.raises(CheckpointError, match=r"final_layernorm.weight \(3\)"):
        parrot_sys.load_pretrained(tmp_path / "out")
    parrot_sys.load_pretrained(tmp_path / "out", allow_non_finite=True)
    for checkpoint in (model, tmp_path / "out"):
        command = ["chat", "--checkpoint", str(checkpoint), "--message", "Hi", "--max-new-tokens", "1"]
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert "holds NaN or infinite weights" in capfd.readouterr().err


def test_multimodal_gpt_is_not_put_together_from_them(tmp_path: Path) -> None:
    released = FIXTURE.parent / "mmgpt_tiny"
    shutil.copytree(released / "llama", tmp_path / "llama")
    _spoil(tmp_path / "llama" / "model.safetensors", "model.norm.weight", [5], math.inf)
    parts = ConvertConfig(
        source_format="multimodal_gpt",
        llm=tmp_path / "llama",
        flamingo=released / "open_flamingo.pt",
        vision=released / "clip-vit-tiny",
        output=tmp_path / "out",
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(1\)"):
        convert(parts)
    assert not (tmp_path / "out").exists()


def test_values_that_are_numbers_load_as_they_are(tmp_path: Path) -> None:
    model = copy_fixture(tmp_path)
    largest = torch.finfo(torch.float32).max
    _spoil(model / "model.safetensors", "model.norm.weight", [0], largest)
    loaded = parrot_sys.load_pretrained(model)[0].hf_state_dict()["model.norm.weight"]
    assert float(loaded[0].detach()) == largest
