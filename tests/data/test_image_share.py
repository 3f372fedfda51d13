"""Ranks that have the same samples read each picture once, and have together what one process has."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.config import DataConfig
from parrot_sys.data.context_share import share_of_rank
from parrot_sys.data.feature_store import FeatureStore
from parrot_sys.data.image_share import ImageShare, deal_images
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.errors import DataError, StorageError
from parrot_sys.parallel import split_counts
from tests.data.comparing import PICTURES, ROWS, record
from tests.data.picture_archives import write_files, write_tar

SIZES = st.integers(1, 4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(kept=st.lists(st.integers(0, 3), max_size=9), contexts=SIZES, tensors=SIZES)
def test_every_image_is_read_by_one_rank_of_those_that_need_it(kept, contexts, tensors):
    images = [(picture, image) for picture, count in enumerate(kept) for image in range(count)]
    bounds = [0, *itertools.accumulate(split_counts(len(images), contexts))]
    looked_at = Counter()
    for context in range(contexts):
        own = images[bounds[context] : bounds[context + 1]]
        dealt = [
            deal_images(kept, ImageShare(context=(context, contexts), tensor=(tensor, tensors)))
            for tensor in range(tensors)
        ]
        read = [
            [(picture, image) for picture, first, end in each.parts for image in range(first, end)] for each in dealt
        ]
        assert list(itertools.chain(*read)) == own
        assert {each.counts for each in dealt} == {tuple(map(len, read))}
        sizes = [len(each.parts) for each in dealt]
        assert max(sizes) - min(sizes) <= 1
        for each in dealt:
            looked_at.update(picture for picture, _, _ in each.parts)
            looked_at.update(each.checked)
    for picture, count in enumerate(kept):
        # A picture of several images may lie across ranks of context parallelism, each of which reads it.
        assert looked_at[picture] == 1 if count <= 1 else 1 <= looked_at[picture] <= min(count, contexts)
    assert deal_images(kept, ImageShare(needed=False)).parts == ()


class Ranks:
    """Loaders of all ranks that have the same samples, each in a thread."""

    def __init__(self, make, *, tensors=1, contexts=1, stages=1):
        self.places = [(s, c, t) for s in range(stages) for c in range(contexts) for t in range(tensors)]
        self.sizes = (contexts, tensors)
        self.barrier = threading.Barrier(len(self.places))
        self.slots = [[] for _ in self.places]
        self.loaders = [
            make(
                images=ImageShare(
                    needed=stage == 0,
                    context=(context, contexts),
                    tensor=(tensor, tensors),
                    agree=lambda failures, rank=rank: self.agree(rank, failures),
                )
            )
            for rank, (stage, context, tensor) in enumerate(self.places)
        ]

    def agree(self, rank, failures):
        self.slots[rank] = list(failures)
        self.barrier.wait(20)
        joined = [failure for slot in self.slots for failure in slot]
        self.barrier.wait(20)
        return joined

    def run(self):
        """Of each rank its steps, or the error that it ended with."""
        results = [None] * len(self.places)

        def work(rank):
            try:
                results[rank] = list(self.loaders[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.places))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def joined(self, steps, name):
        """Of each step and context-parallel rank the micro-batches with the images of its tensor-parallel ranks."""
        contexts, tensors = self.sizes
        for number in range(len(steps[0])):
            for context in range(contexts):
                ranks = [self.places.index((0, context, tensor)) for tensor in range(tensors)]
                yield (
                    context,
                    [self.join([steps[rank][number][i] for rank in ranks], name) for i in range(len(steps[0][number]))],
                )

    def join(self, parts, name):
        counts = parts[0].dealt_images
        if counts is None:
            return parts[0]
        assert {part.dealt_images for part in parts} == {counts}
        found = [getattr(part, name) for part in parts]
        if not sum(counts):
            assert found == [None] * len(parts)
            return parts[0]
        assert tuple(map(len, found)) == counts
        return dataclasses.replace(parts[0], **{name: torch.cat(found)})


FILES = {f"{i}.png": PICTURES[i % 5] for i in range(10)}
RECORDS = [record(i, [f"{(i * 3 + j) % 10}.png" for j in range(i % 4)]) for i in range(13)]
LAYOUTS = [
    {"tensors": 2, "stages": 2},
    {"contexts": 2},
    {"tensors": 3, "contexts": 2, "stages": 2},
    {"tensors": 2},
    {"stages": 3},
]


@pytest.fixture
def maker(processor, tmp_path):
    def make_maker(records=RECORDS, root=None, policy="skip", batch=4, limit=512, store=None):
        path = tmp_path / "set.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        config = DataConfig(
            paths=(str(path),),
            image_roots=(str(root or write_files(tmp_path / "files", FILES)),),
            on_bad_sample=policy,
        )

        def make(**options):
            loader = ParrotDataLoader(
                config, processor, num_visual_rows=ROWS, max_seq_len=limit, global_batch_size=batch, **options
            )
            if store is not None:
                loader.use_features(store)
            return loader

        return make

    return make_maker


@pytest.fixture
def read_pictures(monkeypatch):
    """Names of the pictures in the order in which they are decoded, or their features are read."""
    from parrot_sys.data import images

    names, original, lock = [], images.load_image, threading.Lock()

    def counted(source, **options):
        with lock:
            names.append(str(source))
        return original(source, **options)

    monkeypatch.setattr(images, "load_image", counted)
    return names


def assert_like_one(ranks, results, wanted, name="pixel_values"):
    tensors = ("input_ids", "labels", "visual_source", "image_sample", "guidance_start")
    contexts = ranks.sizes[0]
    for (context, batches), whole in zip(
        ranks.joined(results, name), (step for step in wanted for _ in range(contexts)), strict=True
    ):
        assert len(batches) == len(whole)
        for got, each in zip(batches, whole, strict=True):
            got, each = share_of_rank(got, context, contexts), share_of_rank(each, context, contexts)
            assert got.record_ids == each.record_ids
            assert all(torch.equal(getattr(got, field), getattr(each, field)) for field in tensors)
            one, other = getattr(got, name), getattr(each, name)
            assert (one is None) == (other is None) or not len(one if other is None else other)
            assert one is None or other is None or torch.equal(one, other)
    for (stage, _, _), steps in zip(ranks.places, results, strict=True):
        for got, whole in zip(steps, wanted, strict=True):
            for batch, each in zip(got, whole, strict=True):
                assert batch.record_ids == each.record_ids
                assert torch.equal(batch.input_ids, each.input_ids)
                assert batch.num_images == each.num_images
                if stage:
                    assert batch.pixel_values is None
                    assert batch.image_features is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_decoded_once(maker, read_pictures, layout):
    make = maker()
    wanted = list(make())
    pictures = sorted(read_pictures)
    assert len(pictures) == sum(len(each["image"]) for each in RECORDS)
    read_pictures.clear()
    ranks = Ranks(make, **layout)
    assert_like_one(ranks, ranks.run(), wanted)
    assert sorted(read_pictures) == pictures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_read_once(maker, tmp_path, monkeypatch, layout):
    store = FeatureStore(tmp_path / "features", "tower")
    keys = store.keys(list(maker()().pictures()))
    store.write(keys, torch.arange(float(len(keys))).view(-1, 1, 1).expand(-1, ROWS, 8))
    read, original = [], FeatureStore._read
    monkeypatch.setattr(FeatureStore, "_read", lambda self, key: (read.append(key), original(self, key))[1])
    make = maker(store=store)
    wanted = list(make())
    features = sorted(read)
    assert len(features) == sum(len(each["image"]) for each in RECORDS)
    read.clear()
    ranks = Ranks(make, **layout)
    assert_like_one(ranks, ranks.run(), wanted, "image_features")
    assert sorted(read) == features


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree_on_bad_samples(maker, tmp_path, layout):
    root = write_files(tmp_path / "bad", FILES | {"3.png": b"none", "7.png": PICTURES[5]})
    make = maker(root=root)
    single = make()
    wanted = list(single)
    assert 0 < len(single.statistics.skipped) < 10
    ranks = Ranks(make, **layout)
    assert_like_one(ranks, ranks.run(), wanted)
    for loader in ranks.loaders:
        assert loader.statistics.skipped == single.statistics.skipped
    strict = maker(root=root, policy="error")
    with pytest.raises(DataError) as wanted_error:
        list(strict())
    for result in Ranks(strict, **layout).run():
        assert isinstance(result, DataError)
        assert str(result) == str(wanted_error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_of_storage_ends_all_ranks(maker, tmp_path, layout):
    path = write_tar(tmp_path / "a.tar", FILES)
    ranks = Ranks(maker(root=path, batch=13), **layout)
    write_tar(path, {**FILES, "new.png": b"x"})
    for result in ranks.run():
        assert isinstance(result, StorageError)
        assert "a.tar has changed since its index was read" in str(result)


def test_a_picture_without_rows_is_looked_at(maker, read_pictures, tmp_path):
    """Truncation may remove a picture; a broken one still makes its sample a bad one."""
    text = "What is it? " * 30
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": text}]
    turns += [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "x"}]
    cut = {"id": "cut", "image": ["0.png", "1.png"], "conversations": turns}
    make = maker(records=[cut, record(1, ["2.png"])], limit=60)
    wanted = list(make())
    assert sum(batch.num_images for step in wanted for batch in step) == 2
    assert len(read_pictures) == 3
    read_pictures.clear()
    ranks = Ranks(make, tensors=2, contexts=2)
    assert_like_one(ranks, ranks.run(), wanted)
    assert len(read_pictures) == 3
    (tmp_path / "files/1.png").write_bytes(b"broken")
    assert "record 0 (id 'cut')" in next(
        iter([s for loader in [make()] for _ in [list(loader)] for s in loader.statistics.skipped])
    )
