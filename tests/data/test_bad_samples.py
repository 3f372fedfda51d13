"""Images that records must not name or that break later, and the list of what was left out."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from parrot_sys.data.config import DataConfig
from parrot_sys.data.decoding import ImageLimits
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.skipped import SkippedRecords
from parrot_sys.errors import DataError


@pytest.fixture
def make_loader(processor):
    def make(config, **options):
        return ParrotDataLoader(config, processor, num_visual_rows=17, max_seq_len=512, global_batch_size=4, **options)

    return make


@pytest.fixture
def record(turns):
    def make(name, number=0):
        return {"id": f"r{number}", "image": name, "conversations": turns("<image>\nWhat?", f"Answer {number}.")}

    return make


@pytest.fixture
def good(parrot_tiny, tmp_path):
    return shutil.copy(parrot_tiny / "image_0.png", tmp_path / "good.png").name


def skipped_in(folder, rank=0):
    name = "skipped_records.jsonl" if rank == 0 else f"skipped_records.rank-{rank}.jsonl"
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["../outside.png", "{outside}", "link.png", "folder/../../outside.png"])
def test_names_that_leave_the_image_root(write_records, make_loader, record, good, parrot_tiny, tmp_path, name):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    shutil.move(tmp_path / good, root)
    outside = shutil.copy(parrot_tiny / "image_1.png", tmp_path / "outside.png")
    (root / "link.png").symlink_to(outside)
    path = write_records([record(good), record(name.format(outside=outside), 1)])
    config = {"paths": (path,), "image_roots": (str(root),)}
    with pytest.raises(DataError, match=r"record 1 \(id 'r1'\): image .* leads out of the image root .*root: name"):
        make_loader(DataConfig(**config))
    assert len(make_loader(DataConfig(**config, on_bad_sample="skip")).datasets[0]) == 1
    loader = make_loader(DataConfig(**config, allow_outside_root=True))
    assert sum(batch.num_images for step in loader for batch in step) == 2


def test_pipes_are_bad_samples_and_hang_nobody(write_records, make_loader, record, good, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    path = write_records([record(good), record("pipe.png", 1)])
    with pytest.raises(DataError, match=r"record 1 \(id 'r1'\): image .*pipe\.png is a named pipe; wanted a regular"):
        make_loader(DataConfig(paths=(path,)))


def test_a_picture_over_the_limit_is_a_bad_sample(write_records, make_loader, record, good, tmp_path):
    Image.new("RGB", (1, 60000)).save(tmp_path / "tall.png")
    path = write_records([record(good), record("tall.png", 1)])
    with pytest.raises(
        DataError, match=r"record 1 .*has 1 x 60000 pixels, an aspect ratio of 60000, more than image_limits"
    ):
        list(make_loader(DataConfig(paths=(path,))))
    loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"))
    assert [batch.record_ids for step in loader for batch in step] == [("set:r0",)]
    with pytest.raises(DataError, match=r"image_limits\.max_aspect_ratio=1000"):
        list(make_loader(DataConfig(paths=(path,), image_limits=ImageLimits(max_aspect_ratio=1000))))


def test_every_record_that_was_left_out_is_in_the_file_once(write_records, make_loader, record, good, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = [good] * 10 + ["nowhere.png"] * 30 + ["broken.png"] * 5
    path = write_records([record(name, number) for number, name in enumerate(names)])
    config = DataConfig(paths=(path,), on_bad_sample="skip", names=("mine",))
    for _ in range(2):  # also when the run is started again, and in further epochs
        loader = make_loader(config)
        loader.list_skipped(SkippedRecords(tmp_path / "run", 0))
        for _ in range(2):
            list(loader)
    assert "and 10 more (skipped_records.jsonl has all)" in caplog.text
    listed = skipped_in(tmp_path / "run")
    assert len(listed) == 35
    assert {entry["data_set"] for entry in listed} == {"mine"}
    for number in range(10, 45):
        (entry,) = (entry for entry in listed if f"record {number} (id 'r{number}')" in entry["reason"])
        reason = "nowhere.png is missing" if number < 40 else "broken.png cannot be read: UnidentifiedImageError"
        assert reason in entry["reason"]


def test_each_rank_lists_what_it_finds(write_records, make_loader, record, good, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = write_records([record(name, number) for number, name in enumerate([good, "broken.png", "no.png"] * 8)])
    for rank in range(2):
        loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"), dp_rank=rank, dp_size=2)
        loader.list_skipped(SkippedRecords(tmp_path, rank))
        list(loader)
    reasons = [[entry["reason"] for entry in skipped_in(tmp_path, rank)] for rank in range(2)]
    assert sum("no.png is missing" in reason for reason in reasons[0]) == 8
    assert not any("no.png" in reason for reason in reasons[1])
    assert sorted(map(len, reasons))[0] > 0
    assert sum(map(len, reasons)) == 16


def test_a_full_disk_does_not_end_training(write_records, make_loader, record, good, tmp_path, caplog):
    (tmp_path / "run").write_text("a file in place of a folder")
    path = write_records([record(good), record("nowhere.png", 1)])
    loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"))
    loader.list_skipped(SkippedRecords(tmp_path / "run", 0))
    assert len(list(loader)) == 1
    assert "skipped_records.jsonl cannot be written" in caplog.text


def test_features_of_a_broken_image_are_missed_for_its_own_reason(write_records, make_loader, record, good, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = write_records([record(good), record("broken.png", 1)])
    store = FeatureStore(tmp_path / "features", "tower")
    reason = "image broken.png cannot be read: it is no picture"
    store.failures[store.keys([tmp_path / "broken.png"])[0]] = reason
    store.write(store.keys([tmp_path / good]), torch.ones(1, 17, 8))
    loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"))
    loader.use_features(store)
    assert [batch.record_ids for step in loader for batch in step] == [("set:r0",)]
    assert loader.statistics.skipped == [f"{path}: record 1 (id 'r1'): {reason}"]


def test_damaged_features_stop_training_even_when_bad_samples_are_skipped(
    write_records, make_loader, record, good, tmp_path
):
    store = FeatureStore(tmp_path / "features", "tower")
    store.write(store.keys([tmp_path / good]), torch.ones(1, 17, 8))
    (shard,) = store.directory.glob("*.npy")
    data = shard.read_bytes()
    shard.write_bytes(data[:-40] + b"\xff" + data[-39:])
    loader = make_loader(DataConfig(paths=(write_records([record(good)]),), on_bad_sample="skip"))
    loader.use_features(FeatureStore(tmp_path / "features", "tower"))
    with pytest.raises(DataError, match=r"is damaged \(checksum of"):
        list(loader)
