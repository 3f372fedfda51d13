"""Streams: every pass takes each record once over all ranks, in an order that a state continues, from every source."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.stream.config import StreamConfig
from parrot_sys.data.stream.loader import StreamLoader, StreamRanks
from parrot_sys.errors import ConfigError, DataError
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.record_sets import WRITERS, write_jsonl, write_shards
from tests.data.remote_pictures import QUICK, storage, stored

FILES = {f"{i}.{ending}": PICTURES[i] for i, ending in enumerate(("png", "jpg", "png", "webp", "bmp"))}
RECORDS = [{**record(i, sorted(FILES)[: i % 3]), "lang": "en"} for i in range(11)]
TEXTS = [{key: value for key, value in record(i, []).items() if key != "image"} for i in range(11)]
CASES = [
    (kind, content, store)
    for kind in WRITERS
    for content in ("pictures", "text")
    for store in ("disk", "memory")
    # (No stream reads a folder of energon from an address; pictures beside a remote table are not copied with a shard.)
    if (kind, store) not in (("energon", "memory"), ("parquet names", "memory"))
]


def make(processor, *paths, rank=0, ranks=1, batch=2, most=int, buffer=4, open_shards=2, **values):
    roots = tuple(str(path if path.is_dir() else path.parent) if isinstance(path, Path) else "." for path in paths)
    stream = StreamConfig(enabled=True, buffer=buffer, open_shards=open_shards)
    names = tuple(f"s{i}" for i in range(len(paths)))
    config = DataConfig(
        **{"paths": tuple(map(str, paths)), "image_roots": roots, "names": names, "stream": stream, **values}
    )
    of = StreamRanks(rank=rank, size=ranks, most=most)
    return StreamLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=batch, ranks=of)


def take(loader, steps):
    iterator = iter(loader)
    taken = list(itertools.islice(iterator, steps))
    iterator.close()
    return taken


def ids(steps):
    return [name for step in steps for batch in step for name in batch.record_ids]


@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    ranks=st.integers(1, 3),
    buffer=st.integers(1, 9),
    open_shards=st.integers(1, 3),
    seed=st.integers(0, 99),
    stop=st.integers(0, 9),
)
@pytest.mark.parametrize(("kind", "content", "store"), CASES)
def test_a_pass_takes_each_record_once_and_a_state_goes_on(
    processor, kind, content, store, ranks, buffer, open_shards, seed, stop
):
    records = RECORDS if content == "pictures" else TEXTS
    with stored(None, store) as place, tempfile.TemporaryDirectory() as cache:
        written = WRITERS[kind](place.folder / "set", records, FILES)
        path = place.name(written) if place.address else written
        values = {"buffer": buffer, "open_shards": open_shards, "seed": seed, "ranks": ranks, "batch": ranks}
        values |= {"cache_dir": cache, "remote": QUICK} | ({"image_roots": ()} if place.address else {})
        counts: Counter[str] = Counter()
        for rank in range(ranks):
            whole = take(make(processor, path, rank=rank, **values), 10)
            stopped, again = (make(processor, path, rank=rank, **values) for _ in range(2))
            first = take(stopped, stop)
            state = stopped.state_dict()
            again.load_state_dict(state | {"ranks": [*[None] * rank, *state["ranks"]]})
            assert_same([*first, *take(again, 10 - stop)], whole)
            one_pass = take(make(processor, path, rank=rank, **values), 60)
            # (A rank's part of a pass is what it takes before its stream begins the next one.)
            counts.update(_first_pass(processor, path, rank, values, ids(one_pass)))
        assert counts == {f"s0:r{i}": 1 for i in range(len(RECORDS))}


def _first_pass(processor, path, rank, values, taken):
    loader = make(processor, path, rank=rank, **values)
    iterator, count = iter(loader), 0
    for count in range(1, len(taken) + 1):  # noqa: B007
        next(iterator)
        (stream,) = loader._state["streams"]
        if stream["pass"] > 0:
            break
    iterator.close()
    return taken[: count - 1]


@pytest.mark.parametrize("kind", WRITERS)
def test_samples_are_those_of_an_index(processor, tmp_path, kind):
    path = WRITERS[kind](tmp_path / "set", RECORDS, FILES)
    root = str(path if path.is_dir() else path.parent)
    config = DataConfig(paths=(str(path),), image_roots=(root,), names=("s0",))
    indexed = ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=1)
    wanted = {batch.record_ids: [[batch]] for step in indexed for batch in step}
    for step in take(make(processor, path, batch=1), len(RECORDS)):
        assert_same([step], wanted[step[0].record_ids])


def test_sets_come_as_often_as_their_weights_say(processor, tmp_path):
    paths = [write_jsonl(tmp_path / name, RECORDS, FILES) for name in "ab"]
    loader = make(processor, *paths, weights=(3.0, 1.0), batch=4)
    for step in take(loader, 9):
        assert Counter(name[:2] for name in ids([step])) == {"s0": 3, "s1": 1}


def test_ranks_have_as_many_micro_batches(processor, tmp_path):
    path = write_jsonl(tmp_path / "a", RECORDS, FILES)
    (step,) = take(make(processor, path, most=lambda count: count + 2), 1)
    assert [batch.num_samples for batch in step[-2:]] == [0, 0]
    assert step[0].num_samples


def test_bad_records_are_met_and_named(processor, tmp_path):
    wrong = {"id": "w", "conversations": []}
    path = write_jsonl(tmp_path / "a", [*RECORDS[:3], wrong, {**RECORDS[4], "image": ["none.png"]}], FILES)
    with pytest.raises(DataError, match=r"set\.jsonl: record \d .*data\.on_bad_sample=skip"):
        take(make(processor, path), 3)
    loader = make(processor, path, on_bad_sample="skip")
    assert set(ids(take(loader, 9))) == {"s0:r0", "s0:r1", "s0:r2"}
    assert len(loader.statistics.skipped) == 2
    only = write_jsonl(tmp_path / "b", [wrong], FILES)
    with pytest.raises(DataError, match=r"no record of a whole pass can be used; the first: .*record 0"):
        take(make(processor, only, on_bad_sample="skip"), 1)
    question = {"from": "human", "value": "x " * 999}
    long = [{**RECORDS[0], "conversations": [question, RECORDS[0]["conversations"][1]]}]
    path = write_jsonl(tmp_path / "c", long, FILES)
    with pytest.raises(DataError, match=r"takes \d+ rows, more than max_seq_len=512; fix it.*on_long_sample=skip"):
        take(make(processor, path, on_long_sample="error"), 1)


def test_another_number_of_ranks_or_other_shards_are_refused(processor, tmp_path):
    paths = [write_jsonl(tmp_path / name, RECORDS, FILES) for name in "ab"]
    state = make(processor, paths[0]).state_dict()
    with pytest.raises(DataError, match="the number of data-parallel ranks was 1, is 2"):
        make(processor, paths[0], ranks=2).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.stream\.buffer was 4, is 5"):
        make(processor, paths[0], buffer=5).load_state_dict(state)


@pytest.mark.parametrize("name", ["language_alpha", "text_ratio"])
def test_settings_that_need_an_index_are_refused(name):
    with pytest.raises(ConfigError, match=rf"data\.{name} needs to know all records"):
        DataConfig(paths=("a",), stream=StreamConfig(enabled=True), **{name: 0.5})


def test_shards_behind_an_address_are_here_only_while_they_are_read(processor, tmp_path):
    records = [record(i, ["0.png"]) for i in range(24)]
    write_shards(tmp_path / "b/shards", records, FILES, shards=8)
    wanted = take(make(processor, tmp_path / "b/shards", open_shards=1, buffer=2), 12)
    cache = tmp_path / "cache"
    with storage(tmp_path) as server:
        server.fail("503", "short")
        for address in ("s3://b/shards/*.tar", "s3://b/shards"):
            loader = make(
                processor, address, open_shards=1, buffer=2, cache_dir=str(cache), remote=QUICK, prefetch_steps=1
            )
            iterator, most = iter(loader), 0
            for step in wanted:
                assert_same([next(iterator)], [step])
                most = max(most, len(list(cache.rglob("*.tar"))))
            iterator.close()
            assert 0 < most < 8  # (a step, the one that is prepared, and the open shard)
        write_jsonl(tmp_path / "b/bad", [{"id": "w", "conversations": []}], FILES)
        with pytest.raises(DataError, match=r"^s3://b/bad/set\.jsonl: record 0 \(id 'w'\): "):
            take(make(processor, "s3://b/bad", cache_dir=str(cache), remote=QUICK), 1)
        with pytest.raises(DataError, match=r"data set s3://b/none is missing"):
            make(processor, "s3://b/none", cache_dir=str(cache), remote=QUICK)
