"""A set ratio of samples without and with images: in every step, in every epoch, and across a stop."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.mixture import Group, epoch_length, epoch_order
from parrot_sys.errors import ConfigError, DataError


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.5])
@pytest.mark.parametrize("texts", [10, 400])
def test_the_ratio_holds_in_any_stretch_of_an_epoch(ratio, texts):
    groups = [Group(np.arange(80), 1.0), Group(np.arange(80, 80 + texts), 1.0, text_only=True)]
    orders = [epoch_order(groups, 5, epoch, ratio) for epoch in range(2)]
    drawn = round(80 * ratio)
    for order in orders:
        assert len(order) == epoch_length(groups, ratio) == 80 + drawn
        counts = Counter(order.tolist())
        assert all(counts[i] == 1 for i in range(80))
        often = [counts[i] for i in range(80, 80 + texts)]
        assert max(often) - min(often) <= 1
        assert sum(often) == drawn
        is_text = np.concatenate([[0], np.cumsum(order >= 80)])
        for length in (1, 4, 16, 50):
            inside = is_text[length:] - is_text[:-length]
            assert np.abs(inside - length * ratio / (1 + ratio)).max() <= 1
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() == epoch_order(groups, 5, 0, ratio).tolist()


@pytest.fixture
def sets(write_records, turns, parrot_tiny, tmp_path):
    """A set with images and a text-only record in it, and a text-only set."""
    shutil.copy(parrot_tiny / "image_0.png", tmp_path)
    seen = [{"id": f"i{i}", "image": "image_0.png", "conversations": turns("<image>")} for i in range(12)]
    seen.append({"id": "t", "conversations": turns()})
    told = [{"id": f"t{i}", "conversations": turns()} for i in range(5)]
    return write_records(seen, "seen.json"), write_records(told, "told.json")


def make_loader(processor, paths, batch=6, **settings):
    config = DataConfig(paths=paths, **settings)
    return ParrotDataLoader(config, processor, num_visual_rows=17, max_seq_len=512, global_batch_size=batch)


def ids_of(step):
    return [record_id for batch in step for record_id in batch.record_ids]


def test_every_step_has_both_kinds(sets, processor):
    loader = make_loader(processor, sets, text_ratio=0.5)
    assert (loader.samples_per_epoch, loader.steps_per_epoch) == (18, 3)
    steps = [ids_of(step) for step in loader]
    images = [sum(record_id.startswith("seen:i") for record_id in step) for step in steps]
    assert images == [4, 4, 4]
    assert {i for step in steps for i in step if i.startswith("seen:i")} == {f"seen:i{i}" for i in range(12)}
    texts = {i for step in steps for i in step if not i.startswith("seen:i")}
    assert texts == {"seen:t", *(f"told:t{i}" for i in range(5))}


def test_weights_tell_apart_what_is_drawn_within_a_kind(sets, processor):
    steps = list(make_loader(processor, sets, text_ratio=2.0, weights=(1.0, 0.0)))
    counts = Counter(record_id for step in steps for record_id in ids_of(step))
    assert counts["seen:t"] == 24
    assert sum(counts.values()) == 36


def test_a_stopped_run_goes_on_with_the_same_samples(sets, processor):
    whole = make_loader(processor, sets, text_ratio=0.5)
    wanted = [sorted(ids_of(step)) for _ in range(2) for step in whole]
    stopped = make_loader(processor, sets, text_ratio=0.5)
    for _ in range(4):
        next(iter(stopped))
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = make_loader(processor, sets, text_ratio=0.5)
    resumed.load_state_dict(state)
    assert [sorted(ids_of(step)) for step in resumed] == wanted[4:]
    with pytest.raises(DataError, match=r"data\.text_ratio was 0\.5, is 1\.0"):
        make_loader(processor, sets, text_ratio=1.0).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.text_ratio was 0\.5, is absent"):
        make_loader(processor, sets).load_state_dict(state)


def test_both_kinds_are_needed(sets, processor, write_records, turns):
    with pytest.raises(ConfigError, match=r"needs samples with and without images, got none with an image"):
        make_loader(processor, sets[1:], text_ratio=1.0)
    only_images = write_records([{"image": "image_0.png", "conversations": turns("<image>")}], "only.json")
    with pytest.raises(ConfigError, match=r"got none without an image"):
        make_loader(processor, (only_images,), text_ratio=1.0)
    with pytest.raises(ConfigError, match=r"must be a finite number > 0 or unset, got 0"):
        DataConfig(text_ratio=0.0)
