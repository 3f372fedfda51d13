"""Nothing that a checkpoint brings is executed, whichever command reads it and wherever it stands."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from parrot_sys.cli import save_config
from parrot_sys.errors import CheckpointError
from parrot_sys.evaluation import main as evaluation
from parrot_sys.inference import chat, convert
from parrot_sys.megatron import initialize
from parrot_sys.megatron.checkpoint_reader import _read_index
from parrot_sys.testing.distributed import run_distributed
from parrot_sys.training import main as training
from parrot_sys.training.config import CheckpointConfig
from tests.evaluation.tables import write_table
from tests.training.damage import Hostile, poison, saved
from tests.training.tiny import MODEL, run, tiny_config

STEP = "step-00000001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of one step."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = CheckpointConfig(interval=1, load_from=str(MODEL), export=False)
    run(tiny_config(folder, copies=1, max_steps=1, checkpoint=checkpoint))
    return folder


def _convert(folder: Path, checkpoint: Path) -> None:
    convert.main(["--checkpoint", str(checkpoint), "--output", str(folder / "converted")])


def _chat(folder: Path, checkpoint: Path) -> None:
    chat.main(["--checkpoint", str(checkpoint), "--message", "hello", "--max-new-tokens", "1"])


def _eval(folder: Path, checkpoint: Path) -> None:
    row = {"index": 0, "question": "?", "A": "a", "B": "b", "answer": "A", "category": "c"}
    table = write_table(folder / "MMMB_en.tsv", [row])
    arguments = ["--checkpoint", str(checkpoint), "--data", str(table), "--output", str(folder / "answers")]
    evaluation.main([*arguments, "--mode", "likelihood"])


def _train(folder: Path, checkpoint: Path, *, resume: bool) -> None:
    load_from = MODEL if resume else checkpoint
    config = tiny_config(
        folder, copies=1, max_steps=2, checkpoint=CheckpointConfig(load_from=str(load_from), export=False)
    )
    if not resume:
        config = replace(config, output=str(folder / "new"))
    save_config(config, folder / "settings.yaml")
    initialize.shutdown = lambda: None  # the process groups belong to `run_distributed`, whose process this is
    training.main(["--config", str(folder / "settings.yaml")])


def _load_from(folder: Path, checkpoint: Path) -> None:
    _train(folder, checkpoint, resume=False)


def _resume(folder: Path, checkpoint: Path) -> None:
    _train(folder, checkpoint, resume=True)


READERS = [_convert, _chat, _eval, _load_from, _resume]


def _refused(reader: Callable[[Path, Path], None], folder: Path, checkpoint: Path) -> str:
    """The message of the error that ends the command; empty when it comes to its end."""

    def main(rank: int, size: int) -> str:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # what a user may have set for another program
        try:
            reader(folder, checkpoint)
        except CheckpointError as error:
            return str(error)
        return ""

    (message,) = run_distributed(main, 1)
    return message


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__.strip("_"))
def test_a_hostile_checkpoint_runs_nothing(reader: Callable[[Path, Path], None], whole: Path, tmp_path: Path) -> None:
    for place in ("index", "index attribute", "common", "objects"):
        folder, mark = tmp_path / place.replace(" ", "_"), tmp_path / f"{place} ran"
        shutil.copytree(whole, folder)
        checkpoint = folder / "run" / "checkpoints" / STEP
        poison(checkpoint, place, mark)
        message = _refused(reader, folder, checkpoint)
        assert not mark.exists(), f"{place}: code of the checkpoint ran"
        if place == "objects" and reader is not _resume:
            continue  # these commands read weights only
        assert "mkdir" in message, f"{place}: {message!r}"
        assert str(checkpoint) in message


@pytest.mark.parametrize("reader", [_convert, _chat, _eval, _load_from], ids=lambda reader: reader.__name__.strip("_"))
def test_a_hostile_bin_file_runs_nothing(reader: Callable[[Path, Path], None], tmp_path: Path) -> None:
    mark, model = tmp_path / "ran", tmp_path / "released" / MODEL.name
    shutil.copytree(MODEL.parent, model.parent)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(saved({"weight": Hostile(mark)}))
    message = _refused(reader, tmp_path, model)
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
def test_a_changed_index_is_an_index_or_refused(whole: Path, data: st.DataObject) -> None:
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
