"""Nothing that a checkpoint brings is executed, whichever command reads it and wherever it stands."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from parrot_sys.errors import CheckpointError
from parrot_sys.megatron.checkpoint.reader import _read_index
from tests.training.damage import Hostile, poison, saved
from tests.training.readers import READERS, STEP, Reader, name_of, refused, resume, run_of_one_step
from tests.training.tiny import MODEL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of one step."""
    return run_of_one_step(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("reader", READERS, ids=name_of)
def test_a_hostile_checkpoint_runs_nothing(reader: Reader, whole: Path, tmp_path: Path) -> None:
    for place in ("index", "index attribute", "common", "objects"):
        folder, mark = tmp_path / place.replace(" ", "_"), tmp_path / f"{place} ran"
        shutil.copytree(whole, folder)
        checkpoint = folder / "run" / "checkpoints" / STEP
        poison(checkpoint, place, mark)
        message = refused(reader, folder, checkpoint)
        assert not mark.exists(), f"{place}: code of the checkpoint ran"
        if place == "objects" and reader is not resume:
            continue  # these commands read weights only
        assert "mkdir" in message, f"{place}: {message!r}"
        assert str(checkpoint) in message


@pytest.mark.parametrize("reader", READERS[:-1], ids=name_of)
def test_a_hostile_bin_file_runs_nothing(reader: Reader, tmp_path: Path) -> None:
    mark, model = tmp_path / "ran", tmp_path / "released" / MODEL.name
    shutil.copytree(MODEL.parent, model.parent)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(saved({"weight": Hostile(mark)}))
    message = refused(reader, tmp_path, model)
    assert not mark.exists()
    assert str(model / "pytorch_model.bin") in message


_CALLABLES = sorted(
    (module, name)
    for module in ("builtins", "os", "shutil", "subprocess", "torch", "torch.serialization", "pickle", "pathlib")
    for name, value in vars(importlib.import_module(module)).items()
    if callable(value) and (module, name) not in {("torch", "Size"), ("pathlib", "PosixPath")}
)


@given(st.sampled_from(_CALLABLES))
@settings(max_examples=150, deadline=None)
def test_no_function_is_named_by_an_index(tmp_path_factory: pytest.TempPathFactory, place: tuple[str, str]) -> None:
    module, name = place
    path = tmp_path_factory.getbasetemp() / "named.metadata"
    path.write_bytes(f"c{module}\n{name}\n(tR.".encode())
    if (module, name) == ("torch.serialization", "_get_layout"):
        return  # a look-up in a table, which a real index makes
    with pytest.raises(CheckpointError, match=f"names {module}.{name}"):
        _read_index(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_index_is_an_index_orrefused(whole: Path, data: st.DataObject) -> None:
    content = bytearray((whole / "run" / "checkpoints" / STEP / ".metadata").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = whole / "changed.metadata"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(CheckpointError):
        assert isinstance(_read_index(path), Metadata)


def test_an_index_points_at_files_beside_it_only(whole: Path, tmp_path: Path) -> None:
    for name in ("../__0_0.distcp", "/dev/zero", ".", ""):
        index = pickle.loads((whole / "run" / "checkpoints" / STEP / ".metadata").read_bytes())
        next(iter(index.storage_data.values())).relative_path = name
        (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(CheckpointError, match="no file beside it"):
            _read_index(tmp_path / ".metadata")


def test_types_of_tensors_are_data(tmp_path: Path) -> None:
    index = Metadata({}, planner_data=[torch.bfloat16, torch.Size([1])], storage_data={})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert _read_index(tmp_path / ".metadata").planner_data == [torch.bfloat16, torch.Size([1])]
