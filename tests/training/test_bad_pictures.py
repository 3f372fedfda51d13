"""Pictures that break in training: named for their own reason with and without a feature cache; saved settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from parrot_sys.cli import list_presets
from parrot_sys.config_values import read_yaml
from parrot_sys.data.config import DataConfig
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.training.checkpoint import PROCESSOR, latest_checkpoint
from parrot_sys.training.config import TrainConfig
from tests.training.tiny import FIXTURE, losses, run, tiny_config


def _config(folder: Path, **settings: Any) -> TrainConfig:
    """The tiny run with its pictures in a folder of their own, where one is no picture and one is too long."""
    images = folder / "images"
    if not images.is_dir():
        images.mkdir()
        for path in FIXTURE.glob("image_*.png"):
            shutil.copy(path, images)
        (images / "image_1.png").write_bytes(b"no picture")
        Image.new("RGB", (1, 60000)).save(images / "image_2.png")
    config = tiny_config(folder, max_steps=4, **settings)
    data = dataclasses.replace(config.data, image_roots=(str(images),), on_bad_sample="skip")
    return dataclasses.replace(config, data=data)


def _skipped(config: TrainConfig) -> list[dict[str, str]]:
    files = Path(config.output).glob("skipped_records*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_features_leave_out_the_same_samples_for_the_same_reasons(ranks: int, tmp_path: Path) -> None:
    plain, cached = (
        _config(tmp_path, output=name, cache_image_features=name == "cached") for name in ("plain", "cached")
    )
    run(plain, ranks)
    run(cached, ranks)
    assert losses(cached) == losses(plain)
    wanted = {"image_1.png cannot be read: UnidentifiedImageError", "image_2.png has 1 x 60000 pixels, an aspect ratio"}
    for config in (plain, cached):
        reasons = [entry["reason"] for entry in _skipped(config)]
        assert len(reasons) == len(set(reasons)) > 0
        assert all(sum(reason in text for reason in wanted) == 1 for text in reasons)
        assert {reason for reason in wanted for text in reasons if reason in text} == wanted
    assert sorted(_skipped(cached), key=str) == sorted(_skipped(plain), key=str)


def test_rules_for_pictures_are_saved_with_the_model(tmp_path: Path) -> None:
    config = _config(tmp_path)
    data = dataclasses.replace(config.data, exif="ignore", transparency="black")
    config = dataclasses.replace(
        config, data=data, max_steps=1, checkpoint=dataclasses.replace(config.checkpoint, export=True)
    )
    run(config)
    checkpoint = latest_checkpoint(Path(config.output) / "checkpoints")
    assert checkpoint is not None
    for folder in (Path(config.output) / "hf", checkpoint / PROCESSOR):
        saved = ParrotProcessor.from_pretrained(folder).image_processor
        assert (saved.exif, saved.transparency) == ("ignore", "black")


@pytest.mark.parametrize(
    "preset", ["parrot_align", "parrot_instruct", "wings_align", "wings_instruct", "multimodal_gpt_instruct"]
)
def test_released_recipes_see_pictures_as_the_released_code_does(preset: str) -> None:
    values = read_yaml(list_presets()[preset])
    assert values["data"]["exif"] == "ignore"
    assert DataConfig().exif == "apply"
