"""Checkpoint files: shards, and directories that appear only when complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parrot_sys.errors import CheckpointError
from parrot_sys.models.tensor_files import TensorFiles, new_directory, write_tensors

TENSORS = {
    f"t{i}": torch.randn(5, i + 1).to(dtype)
    for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float64])
}


@pytest.mark.parametrize(("limit", "files"), [(10**6, 1), (60, 3), (100, 2), (1, 4)])
def test_shards(limit: int, files: int, tmp_path: Path) -> None:
    write_tensors(iter(TENSORS.items()), tmp_path, max_shard_bytes=limit)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == (
        ["model.safetensors"] if files == 1 else [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    )
    with TensorFiles(tmp_path) as read:
        assert read.names() == sorted(TENSORS)
        for key, tensor in TENSORS.items():
            assert torch.equal(read.tensor(key), tensor)
            assert (read.shape(key), read.dtype(key)) == (tuple(tensor.shape), tensor.dtype)


def test_views_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors([("a", base.T), ("b", base[1]), ("c", base)], tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["a"], base.T)
    assert torch.equal(saved["b"], base[1])
    assert torch.equal(saved["c"], base)


def test_new_directory(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_directory(path) as work:
        (work / "config.json").write_text("1")
        assert not path.exists()
    assert (path / "config.json").read_text() == "1"
    with pytest.raises(CheckpointError, match="exists already"), new_directory(path):
        pass
    with pytest.raises(IsADirectoryError), new_directory(path, overwrite=True) as work:
        work.write_text("a directory takes no text")
    assert (path / "config.json").read_text() == "1"
    with new_directory(path, overwrite=True) as work:
        (work / "other").touch()
    assert [file.name for file in path.iterdir()] == ["other"]
    assert [folder.name for folder in path.parent.iterdir()] == ["out"]
