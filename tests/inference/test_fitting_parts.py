"""A tokenizer or pictures of another model are found when a model is loaded, and before training reads data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import parrot_sys
from parrot_sys.__main__ import main
from parrot_sys.config_values import config_to_dict
from parrot_sys.data.tokenizer_files import load_tokenizer
from parrot_sys.errors import CheckpointError, ConfigError
from parrot_sys.files import read_json
from parrot_sys.megatron.runtime.initialize import shutdown
from parrot_sys.systems.hf_config import config_from_hf
from tests.foreign_files import change_json, copy_fixture


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """A model whose tokenizer has tokens beyond its 640 rows."""
    model = copy_fixture(tmp_path)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens([f"<new {number}>" for number in range(641 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    assert max(load_tokenizer(model).get_vocab().values()) == 640
    return model


def test_ids_beyond_the_vocabulary(larger: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    beyond = r"1 tokens beyond the model's vocabulary of 640 rows: '<new \d+>' = 640; use the tokenizer"
    with pytest.raises(CheckpointError, match=beyond):
        parrot_sys.load_pretrained(larger)
    model = dataclasses.replace(config_from_hf(read_json(larger / "config.json"), larger), max_seq_len=256)
    settings = {"model": config_to_dict(model), "precision": "fp32", "max_steps": 1}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    train = ["train", "--config", str(tmp_path / "settings.yaml"), "--data.paths", str(tmp_path / "not_read.json")]
    train += ["--output", str(tmp_path / "run")]
    for source in (["--checkpoint.load-from", str(larger)], ["--model.tokenizer-path", str(larger)]):
        with pytest.raises(SystemExit, match="2"):
            main([*train, *source])
        assert "1 tokens beyond the model's vocabulary of 640 rows" in capfd.readouterr().err


@pytest.mark.parametrize("ends", [640, -1, [3, 640], True, "2", [2, None]])
def test_ends_of_answers(ends: Any, tmp_path: Path) -> None:
    model = copy_fixture(tmp_path)
    change_json(model / "generation_config.json", eos_token_id=ends)
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id\S* must be "):
        parrot_sys.load_pretrained(model)


def test_absent_ends_of_answers_are_the_tokenizers(tmp_path: Path) -> None:
    model = copy_fixture(tmp_path)
    change_json(model / "generation_config.json", eos_token_id=None)
    loaded, processor = parrot_sys.load_pretrained(model)
    assert list(loaded.eos_token_ids) == [processor.tokenizer.eos_token_id]


def test_pictures_of_another_size(tmp_path: Path) -> None:
    model = copy_fixture(tmp_path)
    side = {"height": 28, "width": 28}
    change_json(tmp_path / "clip-vit-tiny" / "preprocessor_config.json", size={"shortest_edge": 28}, crop_size=side)
    with pytest.raises(CheckpointError, match="makes pictures of 28 x 28 pixels, but the vision tower takes 56 x 56"):
        parrot_sys.load_pretrained(model)
