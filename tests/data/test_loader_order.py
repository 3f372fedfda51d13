"""The loader: what the order of samples depends on, and that resume goes on with the very same ones."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from parrot_sys.data.config import DataConfig
from parrot_sys.data.mixture import Group, epoch_length, epoch_order
from parrot_sys.errors import DataError
from tests.data.comparing import ids_of


def same_batch(a, b):
    tensors = ("input_ids", "labels", "cu_seqlens", "visual_source", "guidance_rows", "image_sample")
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    assert a.record_ids == b.record_ids
    assert (a.pixel_values is None) == (b.pixel_values is None)
    assert a.pixel_values is None or torch.equal(a.pixel_values, b.pixel_values)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_samples_of_a_step_do_not_depend_on_the_number_of_ranks(ranks, write_records, records, make_loader):
    config = DataConfig(paths=(write_records(records),), max_tokens_per_micro_batch=150)
    alone = [Counter(ids_of(step)) for step in make_loader(config)]
    together = list(zip(*(make_loader(config, rank=rank, ranks=ranks) for rank in range(ranks)), strict=True))
    assert len(together) == len(alone)
    for wanted, steps in zip(alone, together, strict=True):
        assert sum((Counter(ids_of(step)) for step in steps), Counter()) == wanted
        assert len({len(step) for step in steps}) == 1
    if ranks == 7:  # more than samples: some get nothing to do
        assert all(any(not batch.num_samples for step in steps for batch in step) for steps in together)


def test_order_depends_on_seed_and_epoch_only(write_records, records, make_loader):
    path = write_records(records)

    def epochs(seed, **options):
        loader = make_loader(DataConfig(paths=(path,), seed=seed), **options)
        return [[i for step in loader for i in sorted(ids_of(step))] for _ in range(2)]

    first = epochs(1)
    assert first == epochs(1)
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1])
    assert epochs(2) != first


def test_order_is_pinned():
    """A changed order breaks the resume of every run that is under way."""
    groups = [Group(np.arange(6), 1.0), Group(np.arange(6, 10), 0.5)]
    assert epoch_order(groups, seed=42, epoch=0).tolist() == [9, 5, 4, 2, 8, 3, 0, 1]
    assert epoch_order(groups, seed=42, epoch=1).tolist() == [9, 1, 3, 4, 0, 2, 5, 8]


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])
def test_resume_gives_the_very_same_batches(at, write_records, records, make_loader):
    """Also at the end of an epoch (4) and in the second one (6); with a state that went through JSON."""
    config = DataConfig(paths=(write_records(records),), weights=(1.1,))

    def take(loader, count):
        steps = []
        while len(steps) < count:
            for step in loader:
                steps.append(step)
                if len(steps) == count:
                    break
        return steps

    whole = take(make_loader(config), 9)
    stopped = make_loader(config)
    take(stopped, at)
    resumed = make_loader(config)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.statistics == stopped.statistics
    for step, wanted in zip(take(resumed, 9 - at), whole[at:], strict=True):
        for batch, other in zip(step, wanted, strict=True):
            same_batch(batch, other)


def test_resume_on_another_number_of_ranks_and_batch_size(write_records, records, make_loader):
    config = DataConfig(paths=(write_records(records),))
    order = [i for step in make_loader(config, batch=1) for i in ids_of(step)]
    stopped = make_loader(config)
    next(iter(stopped))
    resumed = [make_loader(config, batch=7, rank=rank, ranks=2) for rank in range(2)]
    for loader in resumed:
        loader.load_state_dict(stopped.state_dict())
    steps = [next(iter(loader)) for loader in resumed]
    assert Counter(ids_of(steps[0]) + ids_of(steps[1])) == Counter(order[6:13])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"data\.seed was 42, is 7"),
        ({"weights": (2.0,)}, r"set\.weight was 1\.0, is 2\.0"),
        ({"language_weights": {"pt": 2.0}}, r"data\.language_weights was \{\}, is \{'pt': 2\.0\}"),
        ({"names": ("other",)}, r"set\.file was [0-9a-f]{16}, is absent"),
    ],
)
def test_resume_with_other_settings_is_an_error(change, message, write_records, records, make_loader):
    path = write_records(records)
    state = make_loader(DataConfig(paths=(path,))).state_dict()
    with pytest.raises(DataError, match=message):
        make_loader(DataConfig(paths=(path,), **change)).load_state_dict(state)


def test_resume_with_other_data_is_an_error(write_records, records, make_loader, tmp_path, images):
    path = write_records(records)
    config = DataConfig(paths=(path,), on_bad_sample="skip")
    state = make_loader(config).state_dict()
    (tmp_path / images[0]).unlink()
    with pytest.raises(DataError, match=r"set\.records was 20 \(\w+\), is \d+ \(\w+\)"):
        make_loader(config).load_state_dict(state)
    write_records(records[:-1])
    with pytest.raises(DataError, match=r"set\.file was \w+, is \w+"):
        make_loader(config).load_state_dict(state)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 2.25, 3.0])
def test_weights_say_how_often_a_sample_is_seen(weight):
    group = Group(np.arange(100, 140), weight)
    whole = Group(np.arange(100), 1.0)
    assert epoch_length([whole, group]) == 100 + round(40 * weight)
    seen = Counter()
    for epoch in range(4):
        order = epoch_order([whole, group], seed=3, epoch=epoch)
        counts = Counter(order.tolist())
        assert len(order) == epoch_length([whole, group])
        assert all(counts[i] == 1 for i in range(100))
        assert {counts[i] for i in range(100, 140)} <= {int(weight), -int(-weight // 1)}
        seen.update(i for i in range(100, 140) if counts[i] > int(weight))
    if weight % 1:
        assert len(seen) > round(40 * (weight % 1))  # another part of the group in every epoch


def test_mix_of_sets_and_languages(write_records, make_loader, turns):
    english = [{"lang": "en", "conversations": turns()} for _ in range(40)]
    mixed = [{"lang": "tr" if i % 2 else "en", "conversations": turns()} for i in range(20)]
    config = DataConfig(
        paths=(write_records(english, "one.json"), write_records(mixed, "two.json")),
        weights=(0.5, 2.0),
        language_weights={"tr": 3.0},
    )
    counts = Counter()
    loader = make_loader(config)
    for batch in (batch for step in loader for batch in step):
        counts.update((i.split(":")[0], lang) for i, lang in zip(batch.record_ids, batch.languages, strict=True))
    assert counts == {("one", "en"): 20, ("two", "en"): 20, ("two", "tr"): 60}
    assert loader.samples_per_epoch == 100
