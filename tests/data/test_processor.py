"""Loading and saving of processors; what stands in the way is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import CheckpointError, ConfigError


@pytest.fixture
def checkpoint(parrot_tiny, tmp_path):
    """A copy without weights and without its vision tower."""
    target = tmp_path / "model"
    shutil.copytree(parrot_tiny / "model", target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def set_config(checkpoint, **values):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_special_tokens(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens([tokenizer.pad_token_id, tokenizer.eos_token_id]) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]


def test_save_and_load_again(processor, expected, parrot_tiny, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again = ParrotProcessor.from_pretrained(tmp_path / "saved")
    assert again.image_processor == processor.image_processor
    for case in expected["conversations"]:
        turns = case["source"]["conversations"]
        assert again.format_conversation(turns) == processor.format_conversation(turns)
    image = [parrot_tiny / "image_3.png"]
    assert torch.equal(again.images(image), processor.images(image))


@pytest.mark.parametrize("place", [".", "vision_tower", "../clip-vit-tiny"])
def test_where_the_preprocessor_config_may_lie(place, checkpoint, parrot_tiny, processor):
    target = (checkpoint / place).resolve()
    target.mkdir(exist_ok=True)
    shutil.copy(parrot_tiny / "clip-vit-tiny" / "preprocessor_config.json", target)
    assert ParrotProcessor.from_pretrained(checkpoint).image_processor == processor.image_processor


def test_published_towers_need_no_file(checkpoint):
    set_config(checkpoint, mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert ParrotProcessor.from_pretrained(checkpoint).image_processor == replace(
        ImageProcessor.for_tower("clip", 336), exif="ignore"
    )


def test_without_pad_the_image_is_cropped(checkpoint):
    set_config(checkpoint, mm_vision_tower="openai/clip-vit-large-patch14-336", image_aspect_ratio="square")
    assert not ParrotProcessor.from_pretrained(checkpoint).image_processor.pad_to_square


def test_a_tower_that_is_nowhere_is_an_error(checkpoint):
    set_config(checkpoint, mm_vision_tower="elsewhere/tower")
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config\.json of the vision tower 'elsewhere/tower' is in none of"
    ):
        ParrotProcessor.from_pretrained(checkpoint)


def test_broken_json_is_an_error(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        ParrotProcessor.from_pretrained(checkpoint)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds none that can be read"):
        ParrotProcessor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="must be a directory"):
        ParrotProcessor.from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_without_chatml_is_an_error(checkpoint):
    for name in (
        "tokenizer.json",
        "vocab.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        path = checkpoint / name
        path.write_text(path.read_text().replace("<|im_start|>", "<|other|>"))
    with pytest.raises(CheckpointError, match=r"must have the special token <\|im_start\|>"):
        ParrotProcessor.from_pretrained(checkpoint)


def test_for_tower(parrot_tiny):
    assert ParrotProcessor.for_tower(parrot_tiny / "model", "siglip", 28).images([]).shape == (0, 3, 28, 28)
    with pytest.raises(ConfigError, match=r"vision\.type must be one of clip, siglip, .*, got 'resnet'"):
        ParrotProcessor.for_tower(parrot_tiny / "model", "resnet", 28)


def test_a_bare_language_model_pads_images(checkpoint, parrot_tiny):
    values = json.loads((checkpoint / "config.json").read_text())
    bare = {name: value for name, value in values.items() if not name.startswith(("mm_", "image_"))}
    (checkpoint / "config.json").write_text(json.dumps({**bare, "model_type": "qwen2"}))
    shutil.copy(parrot_tiny / "clip-vit-tiny" / "preprocessor_config.json", checkpoint)
    assert ParrotProcessor.from_pretrained(checkpoint).image_processor.pad_to_square
