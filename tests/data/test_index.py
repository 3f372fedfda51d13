"""The index: the same batches as without one, one builder, builds that go on, what is damaged, changed or of others."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from parrot_sys.data.config import DataConfig
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.index import build
from parrot_sys.data.index.access import IndexPlace, load_index
from parrot_sys.data.index.columns import Texts
from parrot_sys.data.index.lengths import sample_lengths
from parrot_sys.data.packing import expanded_lengths, remaining_labels
from parrot_sys.data.sources.registry import open_source
from parrot_sys.data.templates import INSTRUCTION
from parrot_sys.data.tokenization import ConversationEncoder
from parrot_sys.errors import ConfigError, DataError, StorageError
from tests.data.index_files import (
    facts,
    index_of,
    make_loader,
    make_records,
    plain_batches,
    same_batch,
    write,
)

GOOD = make_records(1, 0, [])
bounded = settings(
    max_examples=20,
    phases=[Phase.generate],  # (to shrink an example takes minutes)
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def pictures(parrot_tiny, tmp_path):
    return [shutil.copy(parrot_tiny / f"image_{i}.png", tmp_path / f"{i}.png").name for i in range(3)]


@bounded
@given(
    data=st.data(),
    seed=st.integers(0, 999),
    name=st.sampled_from(["set.json", "set.jsonl"]),
    ranks=st.integers(1, 3),
    block=st.sampled_from([1, 3, 4096]),
)
def test_batches_are_those_of_records_in_memory(tmp_path, pictures, processor, data, seed, name, ranks, block):
    """Order, packing, pictures, languages and ids, over two epochs; resumed after any step."""
    one = write(tmp_path / name, [*make_records(data.draw(st.integers(1, 12)), seed, pictures, wrong=True), *GOOD])
    other = write(tmp_path / "other.jsonl", make_records(6, seed + 1, pictures))
    config = DataConfig(
        paths=(one, other),
        weights=(data.draw(st.sampled_from([1.0, 0.5, 2.25])), 1.0),
        languages=("pt", "zh"),
        seed=seed,
        on_bad_sample="skip",
    )
    processor, rank = processor.with_data_config(config), ranks - 1
    sizes = {"batch": 5, "rank": rank, "ranks": ranks}
    wanted = [step for epoch in range(2) for step in plain_batches(config, processor, epoch=epoch, **sizes)]
    with patch.object(build, "_BLOCK", block):
        loader = make_loader(config, processor, **sizes)
    stop, got = data.draw(st.integers(0, len(wanted))), []
    while len(got) < stop:
        for step in loader:
            got.append(step)
            if len(got) == stop:
                break
    resumed = make_loader(config, processor, **sizes)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    while len(got) < len(wanted):
        got += list(resumed)
    assert [len(step) for step in got] == [len(step) for step in wanted]
    for step, others in zip(got, wanted, strict=True):
        for batch, right in zip(step, others, strict=True):
            same_batch(batch, right)


@bounded
@given(
    seed=st.integers(0, 999),
    limit=st.integers(1, 200),
    rows=st.sampled_from([1, 3, 17]),
    block=st.sampled_from([1, 4, 99]),
)
def test_lengths_are_those_of_the_ids(tmp_path, processor, seed, limit, rows, block):
    """With any rows of each picture, and any limit, from one index."""
    records = make_records(9, seed, ["a", "b", "c"], wrong=True)
    path = write(tmp_path / f"{seed}.json", records)
    index = index_of(processor, path, tmp_path / "index")
    own = {name: rows + i for i, name in enumerate("abc")}
    with patch("parrot_sys.data.index.lengths._BLOCK", block):
        found = sample_lengths(index, np.array([own[name] for name in index.picture_names]), limit)
        same = sample_lengths(index, np.full(len(index.picture_names), rows), limit)
        assert np.array_equal(sample_lengths(index, rows, limit).labels, same.labels)
    for i, record in enumerate(records):
        if not index.is_good[i]:
            assert (found.rows[i], found.full_rows[i], found.labels[i]) == (0, 0, 0)
            continue
        ((ids, labels),) = processor.encode([processor.render(record["conversations"])])
        each = np.array([own[name] for name in record.get("image", [])], dtype=np.int64)
        assert (found.rows[i], found.full_rows[i]) == expanded_lengths(ids, each, limit)
        assert found.labels[i] == remaining_labels(ids, labels, each, limit)


@bounded
@given(texts=st.lists(st.text(max_size=5)), data=st.data())
def test_texts_keep_what_they_were_given(texts, data):
    packed = Texts.of(texts)
    assert [*packed] == texts
    assert [*Texts.joined([packed, Texts.of(["x"]), packed])] == [*texts, "x", *texts]
    numbers = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9)) if texts else []
    assert [*packed.chosen(np.array(numbers, dtype=np.int64))] == [texts[i] for i in numbers]


def test_an_interrupted_build_goes_on(tmp_path, processor, pictures, monkeypatch):
    """Stopped at any block; what was done is not done again, and a damaged part is."""
    path = write(tmp_path / "set.jsonl", make_records(30, 2, pictures))
    monkeypatch.setattr(build, "_BLOCK", 4)
    wanted = facts(index_of(processor, path, tmp_path / "whole"))
    write_block, done = build.write_block, []

    def one_block(indexer, places, first, part):
        if len(done) > starts:
            raise KeyboardInterrupt
        done.append(first)
        write_block(indexer, places, first, part)

    monkeypatch.setattr(build, "write_block", one_block)
    for starts in range(8):
        with pytest.raises(KeyboardInterrupt):
            index_of(processor, path, tmp_path / "cut")
        assert not list((tmp_path / "cut").glob("set*"))
        if starts == 3:
            part = sorted((tmp_path / "cut").glob(".set*/*.npz"))[1]
            part.write_bytes(part.read_bytes()[:-9])
    starts = 8
    assert facts(index_of(processor, path, tmp_path / "cut")) == wanted
    assert done == [0, 4, 8, 12, 4, 16, 20, 24, 28]
    assert not list((tmp_path / "cut").glob(".set*.parts"))


def test_workers_import_neither_torch_nor_transformers(processor):
    """Which cost each of them seconds; what they are sent measures what the processor encodes all the same."""
    encoder = processor.conversation_encoder()
    program = "import pickle, sys; e = pickle.load(sys.stdin.buffer); found = e[0].measure([e[0].render(e[1])]); "
    program += "sys.stdout.buffer.write(pickle.dumps(found)); import parrot_sys.data.index.workers; "
    program += "print(*sys.modules, file=sys.stderr)"
    turns = [{"from": "human", "value": "<image>\nNaïve <|im_end|> 猫?"}, {"from": "gpt", "value": "A cat."}]
    sent = pickle.dumps((encoder, turns))
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=True)
    (found,) = pickle.loads(done.stdout)
    ((ids, labels),) = processor.encode([processor.render(turns)])
    assert (found.size, found.images) == (len(ids), np.flatnonzero(ids == IMAGE_TOKEN_ID).tolist())
    assert found.labels == [int(np.flatnonzero(labels != IGNORE_ID)[0]), len(ids)]
    assert not {"torch", "transformers"} & set(done.stderr.decode().split())


def test_others_wait_for_the_one_that_builds(tmp_path, processor, pictures, monkeypatch, caplog):
    path = write(tmp_path / "set.json", make_records(12, 4, pictures))
    monkeypatch.setattr(build, "_BLOCK", 3)
    write_block, builds, beats, results = build.write_block, [], [], []

    def slow(*arguments):
        """A block takes until both of the others have looked again."""
        builds.append(threading.get_ident())
        seen, end = len(beats), time.monotonic() + 60
        while len(set(beats[seen:]) - set(builds)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        write_block(*arguments)

    monkeypatch.setattr(build, "write_block", slow)
    monkeypatch.setattr(build, "_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(build, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr("parrot_sys.data.index.waiting._POLL_SECONDS", 0.02)
    monkeypatch.setattr("parrot_sys.data.index.waiting._SAY_SECONDS", 0.0)

    def work():
        found = index_of(processor, path, tmp_path / "index", on_progress=lambda: beats.append(threading.get_ident()))
        results.append(facts(found))

    with caplog.at_level(logging.INFO):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(results) == 3
    assert results[0] == results[1] == results[2]
    assert len(builds) == 4
    assert len(set(builds)) == 1
    assert len(set(beats)) == 3  # the watchdog of each hears of it
    assert "index set.json: 6 of about 12 records" in caplog.text
    for done in ("3 of about 12 records (25%)", "9 of about 12 records (75%)"):
        assert f"has indexed {done}" in caplog.text


def test_a_changed_data_set_is_indexed_again(tmp_path, processor, pictures, caplog):
    path = Path(write(tmp_path / "set.jsonl", make_records(9, 5, pictures)))
    first = facts(index_of(processor, path, tmp_path / "index"))
    text = path.read_text(encoding="utf-8")
    os.utime(path, ns=(1, 1))  # copied: another time, the same content
    with patch.object(ConversationEncoder, "measure", side_effect=AssertionError("tokenised again")):
        for _ in range(2):
            assert facts(index_of(processor, path, tmp_path / "index")) == first
        digest = patch.object(type(open_source(path)), "digest", side_effect=AssertionError("hashed again"))
        with digest:
            index_of(processor, path, tmp_path / "index")
    path.write_text(text.replace("cat", "dog"), encoding="utf-8")  # as long as before
    with caplog.at_level(logging.WARNING):
        assert facts(index_of(processor, path, tmp_path / "index"))["digests"] != first["digests"]
    assert "set.jsonl has changed since its index" in caplog.text
    path.write_text("\n".join(text.splitlines()[:4]), encoding="utf-8")
    assert len(index_of(processor, path, tmp_path / "index")) == 4


def test_records_that_change_under_an_index_stop_the_run(tmp_path, processor, pictures):
    """Even where size and time of the file are what they were."""
    path = Path(write(tmp_path / "set.jsonl", make_records(9, 5, pictures)))
    config = DataConfig(paths=(str(path),), on_bad_sample="skip", image_roots=(str(tmp_path),))
    loader = make_loader(config, processor)
    times = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StorageError, match=r"record \d is not what was indexed in .*: remove that folder"):
        list(loader)


@pytest.mark.parametrize("change", ["tokenizer", "template", "image_position"])
def test_an_index_of_another_model_is_refused_by_name(tmp_path, processor, pictures, change):
    path = write(tmp_path / "set.json", make_records(5, 6, pictures))
    index_of(processor, path, tmp_path / "index")
    other = processor.with_text_rules(processor.image_position, processor.control_tokens)
    if change == "tokenizer":
        other.tokenizer = copy.deepcopy(processor.tokenizer)
        other.tokenizer.add_tokens(["parrots"])
        other.tokenizer.name_or_path = "parrots"
        said = r"the tokenizer was .*parrot_tiny.* \(fingerprint \w+\), is parrots \(fingerprint \w+\)"
    elif change == "template":
        other.template = replace(INSTRUCTION)
        said = "the template was parrot-chatml-1, is instruction-1"
    else:
        other.image_position = "in_place"
        said = r"data\.image_position was front, is in_place"
    place = IndexPlace(folder=tmp_path / "index", is_chosen=True)
    with pytest.raises(ConfigError, match=rf"index .*set\.json-\w+ of .*set\.json is not of this model: {said}.*Name"):
        load_index(open_source(Path(path)), other, place)
    cache = IndexPlace(folder=tmp_path / "cache")  # in a folder of caches each has its own
    for each in (processor, other):
        load_index(open_source(Path(path)), each, cache)
    assert len(list((tmp_path / "cache").glob("index-*/set.json-*/index.json"))) == 2


@bounded
@given(data=st.data(), share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_index_is_built_again(tmp_path, processor, pictures, data, share, flip, cut):
    """Whichever of its files is damaged, wherever."""
    path = write(tmp_path / "set.json", make_records(7, 7, pictures, wrong=True))
    wanted = facts(index_of(processor, path, tmp_path / "index"))
    (folder,) = (tmp_path / "index").glob("set.json-*")
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = file.read_bytes()
    at = int(share * len(whole))
    file.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        assert facts(index_of(processor, path, tmp_path / "index")) == wanted
    except ConfigError:  # the damage made another, whole header of it
        assert file.name == "index.json"
        shutil.rmtree(folder)


def test_nothing_is_left_where_no_folder_is_named(tmp_path, processor, pictures, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(tmp_path / "set.json", make_records(5, 8, pictures))
    loader = make_loader(DataConfig(paths=(path,), on_bad_sample="skip"), processor)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sum(batch.num_samples for step in loader for batch in step) == len(loader.datasets[0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, processor, pictures):
    path = write(tmp_path / "set.json", make_records(5, 8, pictures))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"the index of .*set\.json cannot be written to .*name a folder with room"):
        index_of(processor, path, tmp_path / "file")
