"""`parrot data index`, and training from what it made."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from parrot_sys.__main__ import main
from parrot_sys.data.config import DataConfig
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.tokenization import ConversationEncoder
from tests.data.index_files import make_loader, make_records, write

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"


@pytest.fixture
def path(tmp_path):
    shutil.copy(FIXTURES / "image_0.png", tmp_path / "0.png")
    return write(tmp_path / "set.jsonl", make_records(9, 1, ["0.png"], wrong=True))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("parrot_sys.training.data_index.setup_logging", lambda: None)


def run(*arguments):
    try:
        return main(["data", "index", *arguments])
    except SystemExit as stop:
        return stop.code


def index(path, tmp_path, *more):
    return run(path, "--output", str(tmp_path / "index"), *more)


def test_training_takes_the_index_that_the_command_made(path, tmp_path, capsys):
    start = ["--checkpoint.load-from", str(FIXTURES / "model")]
    assert index(path, tmp_path, *start) == 0
    assert "9 records of" in (said := capsys.readouterr().out)
    assert f"{tmp_path / 'index'}/set.jsonl-" in said
    processor = ParrotProcessor.from_pretrained(FIXTURES / "model")
    config = DataConfig(paths=(path,), index_dir=str(tmp_path / "index"), on_bad_sample="skip")
    with patch.object(ConversationEncoder, "measure", side_effect=AssertionError("tokenised again")):
        assert len(make_loader(config, processor).datasets[0]) > 0
    assert index(path, tmp_path, *start, "--data.control-tokens", "parsed") == 2
    assert "is not of this model: data.control_tokens was text, is parsed. Name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one data set: parrot data index FILE ... --output DIR"),
        (["x.json"], "output must name a folder for the indexes: --output DIR"),
        (["x.json", "--output", "there"], "a tokenizer is needed: set --model.tokenizer-path"),
        (["x.json", "--output", "there", "--workers", "0"], "workers must be >= 1, got 0"),
    ],
)
def test_what_is_missing_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
