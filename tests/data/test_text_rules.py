"""What the loader does with samples that have no label, with images between words, and with control tokens in text."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.cli import list_presets
from parrot_sys.config_values import read_yaml
from parrot_sys.data.config import DataConfig
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.packing import Sample, pack_samples, remaining_labels
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.tokenization import ConversationEncoder
from parrot_sys.errors import DataError

ROWS = 17


@pytest.fixture
def load(processor, write_records):
    def make(records, limit=80, **settings):
        config = DataConfig(paths=(write_records(records),), **settings)
        return ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=limit, global_batch_size=4)

    return make


def only_batch(loader):
    ((batch,),) = list(loader)
    return batch


@settings(max_examples=150, deadline=None)
@given(data=st.data(), visual=st.sampled_from([1, 3, 17]), limit=st.integers(1, 60))
def test_labels_are_counted_as_packing_leaves_them(data, visual, limit):
    ids = data.draw(st.lists(st.sampled_from([IMAGE_TOKEN_ID, 1, 2, 3]), min_size=1, max_size=30))
    labels = [data.draw(st.sampled_from([IGNORE_ID, i])) if i >= 0 else IGNORE_ID for i in ids]
    features = torch.zeros(ids.count(IMAGE_TOKEN_ID), visual, 2)
    sample = Sample(input_ids=ids, labels=labels, image_features=features if len(features) else None)
    packed = pack_samples([sample], num_visual_rows=visual, max_seq_len=limit)
    assert remaining_labels(np.array(ids), np.array(labels), visual, limit) == packed.label_rows.numel()


def test_a_sample_whose_answers_are_cut_away_is_a_bad_one(load, turns, caplog):
    records = [{"id": "good", "conversations": turns()}, {"id": "cut", "conversations": turns("word " * 200, "ok")}]
    message = r"record 1 \(id 'cut'\): has no label: of its \d+ rows max_seq_len=80 cuts away every answer"
    with pytest.raises(DataError, match=rf"{message}; .*data\.on_bad_sample=skip"):
        load(records)
    with caplog.at_level(logging.WARNING):
        loader = load(records, on_bad_sample="skip")
    assert "1 of 2 records left out" in caplog.text
    assert "(id 'cut'): has no label" in caplog.text
    assert only_batch(loader).record_ids == ("set:good",)
    with pytest.raises(DataError, match=r"no usable record; the first: .*has no label"):
        load(records[1:], on_bad_sample="skip")


def test_held_out_samples_without_a_label_are_named_and_kept(processor, write_records, turns, caplog):
    path = write_records([{"id": "cut", "conversations": turns("word " * 200, "ok")}])
    with caplog.at_level(logging.WARNING):
        loader = ParrotDataLoader(
            DataConfig(paths=(path,)),
            processor,
            num_visual_rows=ROWS,
            max_seq_len=80,
            global_batch_size=4,
            needs_labels=False,
        )
    assert "1 of 1 records without a label" in caplog.text
    assert "(id 'cut'): has no label" in caplog.text
    assert only_batch(loader).label_rows.numel() == 0


def test_a_long_sample_that_is_not_cut_keeps_its_own_policy(load, turns, caplog):
    records = [{"id": "good", "conversations": turns()}, {"id": "cut", "conversations": turns("word " * 200, "ok")}]
    with caplog.at_level(logging.WARNING):
        assert only_batch(load(records, on_long_sample="skip")).record_ids == ("set:good",)
    assert "more than max_seq_len=80" in caplog.text
    with pytest.raises(DataError, match=r"takes \d+ rows, more than max_seq_len=80"):
        load(records, on_long_sample="error")


def test_counts_of_labels_are_cached(load, turns, tmp_path, monkeypatch):
    records = [{"id": "good", "conversations": turns()}, {"id": "cut", "conversations": turns("word " * 200, "ok")}]
    settings = {"cache_dir": str(tmp_path / "cache"), "on_bad_sample": "skip"}
    first = load(records, **settings).datasets[0].skipped
    monkeypatch.setattr(ConversationEncoder, "measure", lambda *_: pytest.fail("tokenised again"))
    assert load(records, **settings).datasets[0].skipped == first
    for change in ({"image_position": "front"}, {"control_tokens": "parsed"}):
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            load(records, **settings, **change)


@pytest.fixture
def between(parrot_tiny, turns, tmp_path):
    path = shutil.copy(parrot_tiny / "image_0.png", tmp_path)
    return [
        {"id": "plain", "image": path, "conversations": turns("<image>\nWhat?")},
        {"id": "middle", "image": path, "conversations": turns("Is <image> a cat?")},
    ]


@pytest.mark.parametrize(("position", "shown"), [("in_place", "Is <image> a cat?"), ("front", "<image>\nIs  a cat?")])
def test_images_stand_where_the_setting_says_and_a_move_is_told_once(position, shown, load, between, processor, caplog):
    with caplog.at_level(logging.WARNING):
        batch = only_batch(load(between, 200, image_position=position))
    place = batch.record_ids.index("set:middle")
    ids = batch.input_ids[batch.cu_seqlens[place] : batch.cu_seqlens[place + 1]].tolist()
    first = ids.index(IMAGE_TOKEN_ID)
    text = processor.tokenizer.decode(ids[:first]) + "<image>" + processor.tokenizer.decode(ids[first + ROWS :])
    assert f"user\n{shown}<|im_end|>" in text
    moved = [record.message for record in caplog.records if "is moved to the start of its turn" in record.message]
    assert len(moved) == (position == "front")
    assert all("in 1 of 2 records" in message and "record 1 (id 'middle')" in message for message in moved)


def test_presets_of_released_recipes_have_the_released_position():
    released = [name for name in list_presets() if name.startswith(("parrot_", "wings_", "multimodal_gpt_"))]
    stages = [name for name in released if name.endswith(("_align", "_instruct"))]
    assert len(stages) >= 5
    for name in stages:
        assert read_yaml(list_presets()[name])["data"]["image_position"] == "front", name


def test_the_position_is_kept_with_the_processor(processor, tmp_path):
    for position in ("front", "in_place"):
        processor.with_text_rules(position, "text").save_pretrained(tmp_path / position)
        assert ParrotProcessor.from_pretrained(tmp_path / position).image_position == position
    assert processor.image_position == "front"  # released checkpoints say nothing


def test_control_tokens_in_records_are_text_unless_they_are_to_be_parsed(load, turns, processor):
    records = [{"conversations": turns("What is <|im_end|>?", "A <|im_start|> and <image>.")}]
    end, start = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])

    def counts(**settings):
        ids = only_batch(load(records, **settings)).input_ids.tolist()
        return ids.count(end), ids.count(start), ids.count(IMAGE_TOKEN_ID)

    assert counts() == (3, 3, 0)
    assert counts(control_tokens="parsed") == (4, 4, 0)


def test_markers_that_are_read_as_text_are_told(load, turns, caplog):
    with caplog.at_level(logging.WARNING):
        load([{"conversations": turns()}, {"id": "tag", "conversations": turns("What does <image> mean?")}])
    assert "1 of 2 records hold <image> where no image belongs, which is read as text" in caplog.text
    assert "record 1 (id 'tag')" in caplog.text
