"""Checkpoints as other programs write them: whatever a file holds, it loads or an error names the file."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.tokenizer_files import check_vocabulary, load_tokenizer
from parrot_sys.errors import CheckpointError, ParrotError
from parrot_sys.files import read_json
from parrot_sys.models.tensor_files import TensorFiles, write_tensors
from parrot_sys.systems.config import ParrotConfig
from parrot_sys.systems.hf_config import config_from_hf
from tests.foreign_files import FIXTURE, JSON_VALUES, attempt, change_json, copy_fixture

MODEL, TOWER = FIXTURE / "model", FIXTURE / "clip-vit-tiny"
CONFIG = read_json(MODEL / "config.json")
PREPROCESSOR = read_json(TOWER / "preprocessor_config.json")
OWN = {"parrot_sys": {"moe": {"topk": 2}, "llm": {"rope_scaling": None}, "vision": {"select_layer": -1}}}
EXTRA = ["rope_scaling", "rope_parameters", "head_dim", "attention_bias", "lora_dim", "parrot_sys", "model_type"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_fixture(tmp_path_factory.mktemp("copy"))


@given(key=st.sampled_from([*CONFIG, *EXTRA]), value=JSON_VALUES)
@settings(max_examples=300)
def test_config_json(key: str, value: Any) -> None:
    config, error = attempt(lambda: config_from_hf({**CONFIG, key: value}, MODEL))
    assert isinstance(config, ParrotConfig) if error is None else str(MODEL) in error


@pytest.mark.parametrize("key", [*CONFIG, *EXTRA])
def test_null_counts_as_absent_in_config_json(key: str) -> None:
    without = {name: value for name, value in CONFIG.items() if name != key}
    absent = attempt(lambda: config_from_hf(without, MODEL))
    assert attempt(lambda: config_from_hf({**CONFIG, key: None}, MODEL)) == absent


@given(
    path=st.sampled_from([("moe", "topk"), ("moe",), ("llm", "head_dim"), ("vision", "select_layer"), ("wings",)]),
    value=JSON_VALUES,
)
def test_our_own_part_of_config_json(path: tuple[str, ...], value: Any) -> None:
    for name in reversed(path):
        value = {name: value}
    config, error = attempt(lambda: config_from_hf({**CONFIG, "parrot_sys": value}, MODEL))
    assert isinstance(config, ParrotConfig) if error is None else str(MODEL / "config.json") in error


def test_null_counts_as_absent_in_our_own_part() -> None:
    nulls = {"moe": {"topk": None, "routing": None}, "vision": None, "llm": None, "template": None}
    assert config_from_hf({**CONFIG, "parrot_sys": nulls}, MODEL) == config_from_hf(CONFIG, MODEL)


@given(key=st.sampled_from([*PREPROCESSOR, "image_aspect_ratio"]), value=JSON_VALUES)
@settings(max_examples=200)
def test_preprocessor_config_json(key: str, value: Any) -> None:
    values = {**PREPROCESSOR, key: value}
    if isinstance(value, int) and value > 10_000:
        return  # a picture that large is a matter of memory, not of types
    processor, error = attempt(lambda: ImageProcessor.from_dict(values, image_aspect_ratio="pad", file="the.file"))
    if error is not None:
        assert "the.file: " in error
        return
    assert all(std > 0 for std in processor.std)
    assert processor.height > 0


@given(
    file=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]),
    key=st.sampled_from(
        ["tokenizer_class", "eos_token", "added_tokens_decoder", "model", "model_max_length", "errors"]
    ),
    value=JSON_VALUES,
)
@settings(max_examples=60, deadline=None)
def test_tokenizer_files(file: str, key: str, value: Any, copy: Path) -> None:
    original = (copy / file).read_text(encoding="utf-8")
    change_json(copy / file, **{key: value})
    try:
        tokenizer, error = attempt(lambda: load_tokenizer(copy))
    finally:
        (copy / file).write_text(original, encoding="utf-8")
    assert tokenizer is not None if error is None else str(copy) in error


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_no_code_of_a_checkpoint_is_run_and_nothing_asks(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_fixture(tmp_path)
    path = (tmp_path / "clip-vit-tiny" if file.startswith("pre") else model) / file
    change_json(path, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]})
    (path.parent / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(CheckpointError, match=rf"{file}: auto_map asks for Python code of the checkpoint"):
        ParrotProcessor.from_pretrained(model)
    assert not (tmp_path / "ran").exists()


def test_ids_beyond_the_vocabulary_are_named() -> None:
    tokenizer = load_tokenizer(MODEL)
    most = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, most + 1, MODEL)
    with pytest.raises(CheckpointError, match=rf"1 tokens beyond the model's .* {most} rows: '.*' = {most};"):
        check_vocabulary(tokenizer, most, MODEL)


@given(
    index=st.one_of(
        JSON_VALUES,
        st.fixed_dictionaries({"weight_map": JSON_VALUES}),
        st.fixed_dictionaries({"weight_map": st.fixed_dictionaries({"a": JSON_VALUES, "b": st.just("one")})}),
    )
)
def test_index_files(index: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("index")
    save_file({"a": torch.ones(2)}, folder / "one")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ParrotError, match=str(folder)):
        TensorFiles(folder)


def test_shards_lie_beside_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "out.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../out.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"shards must lie beside it, got the file name '../out.safetensors'"):
        TensorFiles(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "must hold a dictionary with text as keys, got list"),
        ({1: torch.ones(1)}, "must hold a dictionary with text as keys, got other keys"),
        ({"a": 3}, "a must be a tensor, got int"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict must be a tensor, got dict"),
        ({"a": torch.ones(2).to_sparse()}, "a must be a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a must be a dense tensor of .* got torch.complex64"),
        ({"a": Fraction(1, 2)}, "holds objects of fractions.Fraction, which are not loaded because they can run any"),
    ],
)
def test_bin_contents(content: Any, match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/pytorch_model.bin:? {match}"):
        TensorFiles(tmp_path)


class _Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_in_a_bin_is_run(zipped: bool, tmp_path: Path) -> None:
    content = {"a": torch.ones(1), "b": _Hostile(tmp_path / "ran")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds objects of \S*open, which are not loaded"):
        TensorFiles(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_of_old_and_new_versions(zipped: bool, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with TensorFiles(tmp_path) as files:
        assert all(torch.equal(files.tensor(key), tensor) for key, tensor in tensors.items())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_cut_and_changed_weights(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(["model.safetensors", "pytorch_model.bin"]))
    folder = tmp_path_factory.mktemp("weights")
    tensors = {"a": torch.randn(4, 4), "b": torch.ones(3)}
    if name.endswith("bin"):
        torch.save(tensors, folder / name)
    else:
        write_tensors(tensors.items(), folder)
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)

    def read() -> list[torch.Tensor]:
        with TensorFiles(folder) as files:
            return [files.tensor(key) for key in files.names()]

    tensors_read, error = attempt(read)
    assert all(isinstance(each, torch.Tensor) for each in tensors_read) if error is None else str(folder) in error


def test_reading_maps_a_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before stays what it was, in either format."""
    monkeypatch.setattr("parrot_sys.models.tensor_files._MAPPED_BYTES", 1)
    tensors = {str(i): torch.randn(5) for i in range(4)}
    for write in (lambda: write_tensors(tensors.items(), tmp_path), lambda: _as_bin(tmp_path)):
        write()
        with TensorFiles(tmp_path) as files:
            read = {key: files.tensor(key) for key in (*tensors, *tensors)}
        assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def _as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
