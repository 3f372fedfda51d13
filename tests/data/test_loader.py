"""The loader: what batches hold, and what happens to bad and long samples."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from parrot_sys.data import step_images, step_loader
from parrot_sys.data.config import DataConfig
from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.tokenization import ConversationEncoder
from parrot_sys.errors import ConfigError, DataError
from tests.data.comparing import ROWS, ids_of

LIMIT = 512


def test_an_epoch_has_every_record_once_with_its_own_content(write_records, records, make_loader, processor, tmp_path):
    loader = make_loader(DataConfig(paths=(write_records(records),)))
    assert (loader.steps_per_epoch, loader.samples_per_epoch) == (4, 20)
    steps = list(loader)
    assert [len(ids_of(step)) for step in steps] == [6, 6, 6, 2]
    by_id = {f"set:{record['id']}": record for record in records}
    seen = []
    for batch in (batch for step in steps for batch in step):
        assert batch.num_rows <= LIMIT
        first_image = 0
        for s, record_id in enumerate(batch.record_ids):
            record = by_id[record_id]
            rows = slice(batch.cu_seqlens[s], batch.cu_seqlens[s + 1])
            ids = batch.input_ids[rows].tolist()
            wanted = processor.format_conversation(record["conversations"])
            assert [i for i in ids if i != IMAGE_TOKEN_ID] == [i for i in wanted["input_ids"] if i != IMAGE_TOKEN_ID]
            learned = [i for i in wanted["labels"] if i >= 0]
            assert batch.labels[rows][batch.labels[rows] >= 0].tolist() == learned
            names = [record["image"]] if isinstance(record["image"], str) else record["image"] or []
            assert ids.count(IMAGE_TOKEN_ID) == ROWS * len(names)
            pixels = processor.images([tmp_path / name for name in names])
            if names:
                assert torch.equal(batch.pixel_values[first_image : first_image + len(names)], pixels)
            first_image += len(names)
            assert batch.languages[s] == record["lang"]
            seen.append(record_id)
    assert sorted(seen) == sorted(by_id)
    assert loader.statistics.samples == 20


def test_first_turn_guidance_reaches_the_batches(write_records, make_loader, images, turns):
    records = [{"image": images[0], "conversations": turns("<image>\nWhat?") + turns("And the colour?", "Red.")}]
    path = write_records(records)
    prompt, first = (
        next(iter(make_loader(DataConfig(paths=(path,)), guidance=guidance)))[0]
        for guidance in ("prompt", "first_turn")
    )
    assert first.guidance_rows.tolist() == [r for r in prompt.guidance_rows.tolist() if r < first.label_rows[0] + 1]
    assert len(first.guidance_rows) < len(prompt.guidance_rows)


def test_jsonl_image_roots_names_and_languages(write_records, records, make_loader, images, tmp_path, turns):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / images[0], tmp_path / "elsewhere")
    path = write_records([{"image": images[0], "conversations": turns("<image>")}], "set.jsonl")
    config = DataConfig(paths=(path,), image_roots=(str(tmp_path / "elsewhere"),), names=("mine",), languages=("ru",))
    batch = next(iter(make_loader(config)))[0]
    assert batch.record_ids == ("mine:0",)
    assert batch.languages == ("ru",)


def test_features_come_from_the_store(write_records, records, make_loader, tmp_path):
    store = FeatureStore(tmp_path / "features", "tower")
    config = DataConfig(paths=(write_records(records),))
    loader = make_loader(config)
    loader.use_features(store)
    paths = list(loader.pictures())
    assert len(paths) == 4
    with pytest.raises(DataError, match=r"record \d+ \(id 'r\d+'\): feature store .* holds no features"):
        list(loader)
    store.write(store.keys(paths), torch.arange(4.0).view(4, 1, 1).expand(4, ROWS, 8))
    names = {path: i for i, path in enumerate(paths)}
    for batch in (batch for step in loader for batch in step):
        assert batch.pixel_values is None
        wanted = []
        for record_id in batch.record_ids:
            image = records[int(record_id.removeprefix("set:r"))]["image"]
            wanted += [image] if isinstance(image, str) else image or []
        got = [] if batch.image_features is None else batch.image_features[:, 0, 0].int().tolist()
        assert got == [names[str(tmp_path / name)] for name in wanted]


def test_batches_for_a_gpu_are_page_locked_with_one_copy_of_the_pixels(processor, write_records, records, monkeypatch):
    """Without a GPU there is no such memory: each tensor must have asked for it, pixels when they are joined."""
    locked, joined = set(), []

    def lock(tensor):
        locked.add(id(tensor))
        return tensor

    def join(tensors):
        joined.append(lock(torch.cat(tensors)))
        return joined[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: id(tensor) in locked)
    monkeypatch.setattr(step_loader, "pinned_cat", join)
    config = DataConfig(paths=(write_records(records),), max_tokens_per_micro_batch=10_000)
    size = {"num_visual_rows": 17, "max_seq_len": 512, "global_batch_size": len(records)}
    ((batch,),), ((plain,),) = (list(ParrotDataLoader(config, processor, pin_memory=p, **size)) for p in (True, False))
    for field in dataclasses.fields(batch):
        if torch.is_tensor(value := getattr(batch, field.name)):
            assert id(value) in locked, field.name
            assert torch.equal(value, getattr(plain, field.name))
    assert any(batch.pixel_values is each for each in joined)


def test_a_step_that_is_taken_has_no_pictures_left_to_free(write_records, records, make_loader, monkeypatch):
    """Those that were joined to its batches: freeing them took a step milliseconds that it had to wait."""
    read, left, finish = [], [], step_loader.StepLoader._finish
    read_own = step_images.ImageReader.read_own

    def reading(self, draft, run):
        read_own(self, draft, run)
        read.append(len(draft.loaded))

    def finished(self, plan, joined, run):
        left.append((len(plan.draft.loaded), joined is not None))
        return finish(self, plan, joined, run)

    monkeypatch.setattr(step_images.ImageReader, "read_own", reading)
    monkeypatch.setattr(step_loader.StepLoader, "_finish", finished)
    assert list(make_loader(DataConfig(paths=(write_records(records),))))
    assert any(read)
    assert set(left) == {(0, True)}


def test_leaving_an_epoch_early_stops_the_threads(write_records, records, make_loader):
    loader = make_loader(DataConfig(paths=(write_records(records),)), batch=1)
    before = threading.active_count()
    steps = iter(loader)
    next(steps)
    assert threading.active_count() > before
    steps.close()
    assert threading.active_count() == before
    assert len(list(loader)) == 19


def test_wrong_records_and_missing_images_stop_the_start(write_records, records, make_loader, tmp_path, images):
    path = write_records([*records, {"id": "x", "conversations": []}])
    with pytest.raises(
        DataError, match=r"set\.json: record 20 \(id 'x'\): `conversations` must be .*data\.on_bad_sample=skip"
    ):
        make_loader(DataConfig(paths=(path,)))
    path = write_records(records)
    (tmp_path / images[1]).unlink()
    with pytest.raises(
        DataError, match=r"set\.json: record 1 \(id 'r1'\): image .*image_1\.png is missing \(1 of \d+ such"
    ):
        make_loader(DataConfig(paths=(path,)))


def test_wrong_records_can_be_left_out_and_are_named(write_records, records, make_loader, tmp_path, images, caplog):
    path = write_records([*records, {"id": "x", "conversations": []}])
    (tmp_path / images[1]).unlink()
    gone = [r["id"] for r in records if images[1] in (r["image"] or [])]
    with caplog.at_level(logging.WARNING):
        loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"))
    assert f"{len(gone) + 1} of 21 records left out" in caplog.text
    assert all(f"(id '{name}')" in caplog.text for name in [*gone, "x"])
    assert len(loader.datasets[0].skipped) == len(gone) + 1
    seen = [i.removeprefix("set:") for step in loader for i in ids_of(step)]
    assert sorted(seen) == sorted({r["id"] for r in records} - set(gone))


def test_a_broken_image_stops_at_use(write_records, records, make_loader, tmp_path, images):
    loader = make_loader(DataConfig(paths=(write_records(records),)))
    (tmp_path / images[2]).write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"set\.json: record \d+ \(id 'r\d+'\): image .*image_2\.png cannot be read: Unidentified"
    ):
        list(loader)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_image_can_be_left_out_counted_and_listed(
    ranks, write_records, records, make_loader, tmp_path, images, caplog
):
    config = DataConfig(paths=(write_records(records),), on_bad_sample="skip")
    loaders = [make_loader(config, rank=rank, ranks=ranks) for rank in range(ranks)]
    (tmp_path / images[2]).write_bytes(b"no image")
    broken = {
        r["id"] for r in records if images[2] in ([r["image"]] if isinstance(r["image"], str) else r["image"] or [])
    }
    with caplog.at_level(logging.WARNING):
        steps = [step for loader in loaders for _ in range(2) for step in loader]
    seen = Counter(i.removeprefix("set:") for step in steps for i in ids_of(step))
    assert seen == {r["id"]: 2 for r in records if r["id"] not in broken}
    listed = [reason for loader in loaders for reason in loader.state_dict()["statistics"]["skipped"]]
    assert len(listed) == len(broken)  # two epochs, named once
    assert all(any(f"(id '{name}')" in reason for reason in listed) for name in broken)
    assert caplog.text.count("sample left out") == len(broken)
    assert all(loader.statistics.samples == 40 for loader in loaders)


def test_nothing_usable_is_an_error_even_when_skipping(write_records, make_loader):
    path = write_records([{"conversations": []}])
    with pytest.raises(DataError, match=r"no usable record; the first: .*record 0"):
        make_loader(DataConfig(paths=(path,), on_bad_sample="skip"))


@pytest.fixture
def long_records(turns, images):
    long = "word " * 100
    return [
        {"id": "short", "conversations": turns()},
        {"id": "text", "conversations": turns("Hi", "reached") + turns(long, "never reached")},
        {"id": "image", "image": images[0], "conversations": turns("<image>\nWhat?", long)},
    ]


def test_long_samples_are_cut_and_counted(write_records, long_records, make_loader, caplog):
    with caplog.at_level(logging.WARNING):
        loader = make_loader(DataConfig(paths=(write_records(long_records),)), limit=60)
    assert "data set set: 2 of 3 samples are cut to 60 rows" in caplog.text
    lengths = {}
    for batch in next(iter(loader)):
        lengths |= dict(zip(batch.record_ids, batch.cu_seqlens.diff().tolist(), strict=True))
    assert lengths["set:text"] == lengths["set:image"] == 60
    assert lengths["set:short"] < 60
    assert loader.statistics.truncated == 2


def test_an_image_that_is_cut_in_two_keeps_its_first_rows(write_records, make_loader, images, turns, processor):
    conversations = turns("Hi", "Yes.") + turns("<image><image>\nWhat?")
    path = write_records([{"image": images[:2], "conversations": conversations}])
    ids = processor.format_conversation(conversations)["input_ids"]
    text = ids.index(IMAGE_TOKEN_ID)  # rows before the first image; a newline stands between the two
    batch = next(iter(make_loader(DataConfig(paths=(path,)), limit=text + ROWS + 6)))[0]
    assert batch.visual_source.tolist() == list(range(ROWS + 5))
    assert (batch.num_images, batch.num_rows) == (2, text + ROWS + 6)
    assert 0 < batch.label_rows.numel() < len(processor.encode_text("Yes.")) + 4  # those of the first answer
    batch = next(iter(make_loader(DataConfig(paths=(path,)), limit=text + ROWS + 1)))[0]
    assert batch.num_images == batch.pixel_values.shape[0] == 1


def test_long_samples_can_be_errors_or_left_out(write_records, long_records, make_loader, caplog):
    path = write_records(long_records)
    with pytest.raises(
        DataError, match=r"record 1 \(id 'text'\): takes \d+ rows, more than max_seq_len=60 .*on_long_sample=skip"
    ):
        make_loader(DataConfig(paths=(path,), on_long_sample="error"), limit=60)
    with caplog.at_level(logging.WARNING):
        loader = make_loader(DataConfig(paths=(path,), on_long_sample="skip"), limit=60)
    assert "2 of 3 records left out" in caplog.text
    assert ids_of(next(iter(loader))) == ["set:short"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_roots": ("a", "b")}, r"data\.image_roots must hold one value for each of the 3 data\.paths, got 2"),
        ({"names": ("a",)}, r"data\.names must hold one value for each of the 3 data\.paths, got 1"),
        ({"names": ("a", "b", "a")}, r"data\.names must differ, got 'a' more than once"),
        ({"weights": (-1.0,)}, r"data\.weights\[0\] must be a finite number >= 0, got -1\.0"),
        ({"language_weights": {"en": float("nan")}}, r"data\.language_weights\.en must be a finite number"),
        ({"num_workers": 0}, r"data\.num_workers must be >= 1, got 0"),
        ({"max_tokens_per_micro_batch": 0}, r"data\.max_tokens_per_micro_batch must be >= 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(paths=("x/a.json", "x/b.json", "y/c.json"), **settings)


def test_settings_that_contradict_the_data(write_records, records, make_loader):
    path = write_records(records)
    with pytest.raises(ConfigError, match=r"names 'xx'; the data have the languages \['en', 'pt'\]"):
        make_loader(DataConfig(paths=(path,), language_weights={"xx": 1.0}))
    with pytest.raises(ConfigError, match="leave no sample in an epoch"):
        make_loader(DataConfig(paths=(path,), weights=(0.0,)))
    with pytest.raises(ConfigError, match=r"must hold the longest sample of \d+ rows, got 40"):
        make_loader(DataConfig(paths=(path,), max_tokens_per_micro_batch=40))
    with pytest.raises(ConfigError, match="at least one data set, got none"):
        make_loader(DataConfig())
    with pytest.raises(ConfigError, match=r"got 6 and rank 2 of 2"):
        make_loader(DataConfig(paths=(path,)), rank=2, ranks=2)


def test_an_index_serves_any_limit_and_is_made_anew_for_other_records(
    write_records, records, make_loader, tmp_path, monkeypatch
):
    config = DataConfig(paths=(write_records(records),), cache_dir=str(tmp_path / "cache"))
    first = make_loader(config)
    with monkeypatch.context() as patch:
        patch.setattr(ConversationEncoder, "measure", lambda *_: pytest.fail("tokenised again"))
        assert np.array_equal(first.datasets[0].rows, make_loader(config).datasets[0].rows)
        longer = make_loader(config, rows=ROWS + 1).datasets[0].rows - first.datasets[0].rows
        assert longer.tolist() == [i % 3 for i in range(20)]
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            make_loader(replace(config, control_tokens="parsed"))
    write_records(records[:-1])
    assert len(make_loader(config).datasets[0].rows) == 19
