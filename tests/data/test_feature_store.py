"""The feature store: what is written is found again, by anyone, and only whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.decoding import image_digest
from parrot_sys.data.feature_store import DamagedFeaturesError, FeatureStore, tower_fingerprint
from parrot_sys.errors import DataError


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(6):
        path = tmp_path / f"image{i}.png"
        path.write_bytes(bytes([i]) * 10)
        paths.append(str(path))
    return paths


def features(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).expand(-1, 3, 2).contiguous()


def test_written_features_are_found_again(files, tmp_path):
    store = FeatureStore(tmp_path / "store", "tower")
    keys = store.keys(files)
    assert store.missing(files) == files
    store.write(keys[:2], features(0, 1))
    store.write(keys[2:5], features(2, 3, 4))
    for reader in (store, FeatureStore(tmp_path / "store", "tower")):
        assert reader.missing(files) == files[5:]
        result = reader.get([keys[4], keys[0], keys[4]])
        assert result.dtype == torch.float32
        assert torch.equal(result, features(4, 0, 4))
        assert len(reader) == 5


def test_a_copy_is_the_same_image(files, tmp_path):
    copy = shutil.copy(files[0], tmp_path / "copy.png")
    store = FeatureStore(tmp_path / "store", "tower")
    assert store.missing([files[0], copy, files[1]]) == files[:2]
    store.write(store.keys(files[:1]), features(7))
    assert store.missing([copy]) == []
    assert torch.equal(store.get(store.keys([copy])), features(7))


def test_towers_do_not_mix(files, tmp_path):
    one, other = FeatureStore(tmp_path / "s", "a" * 64), FeatureStore(tmp_path / "s", "b" * 64)
    one.write(one.keys(files), features(*range(6)))
    assert other.missing(files) == files


def test_bfloat16_is_stored_as_float32(files, tmp_path):
    store = FeatureStore(tmp_path / "store", "tower")
    store.write(store.keys(files[:1]), features(1.5).bfloat16())
    assert torch.equal(store.get(store.keys(files[:1])), features(1.5))


def test_readers_see_what_was_written_after_they_opened(files, tmp_path):
    writer, reader = FeatureStore(tmp_path / "s", "t"), FeatureStore(tmp_path / "s", "t")
    writer.write(writer.keys(files[:1]), features(3))
    assert torch.equal(reader.get(reader.keys(files[:1])), features(3))


def _write_and_die(directory, files):
    store = FeatureStore(directory, "t")
    store.write(store.keys(files[:2]), features(0, 1))

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die  # in the middle of the next write, with its bytes on disk
    store.write(store.keys(files[2:4]), features(2, 3))


def test_a_killed_writer_loses_only_its_last_write(files, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(tmp_path / "s", files))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = FeatureStore(tmp_path / "s", "t")
    assert store.missing(files) == files[2:]
    store.write(store.keys(files[2:]), features(2, 3, 4, 5))
    assert torch.equal(store.get(store.keys(files)), features(*range(6)))


def _write_share(directory, files, rank):
    store = FeatureStore(directory, "t")
    for path in files[rank::3]:
        store.write(store.keys([path]), features(files.index(path)))


def test_several_processes_write_at_once(files, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_share, args=(tmp_path / "s", files, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = FeatureStore(tmp_path / "s", "t")
    assert torch.equal(store.get(store.keys(files)), features(*range(6)))


def test_errors(files, tmp_path):
    store = FeatureStore(tmp_path / "s", "t")
    keys = store.keys(files)
    with pytest.raises(DataError, match=rf"no features of 2 of 2 images \(first key {keys[0]}\)"):
        store.get(keys[:2])
    with pytest.raises(DataError, match=r"must be \[2, V, C\] for 2 keys, got \[1, 3, 2\]"):
        store.write(keys[:2], features(1))
    store.write(keys[:1], features(1))
    with pytest.raises(DataError, match=r"must be \[n, 3, 2\] as in .*, got \[n, 4, 2\]"):
        store.write(keys[1:2], torch.zeros(1, 4, 2))
    with pytest.raises(DataError, match=r"nowhere\.png is missing"):
        store.missing([tmp_path / "nowhere.png"])


# damage


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_damaged_features_are_never_read(share, flip, cut):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(3)]
        for i, file in enumerate(files):
            file.write_bytes(bytes([i]))
        store = FeatureStore(folder, "t")
        store.write(store.keys(files), features(1, 2, 3))
        (shard,) = store.directory.glob("*.npy")
        data = bytearray(shard.read_bytes())
        at = int(share * len(data))
        shard.write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        again = FeatureStore(folder, "t")
        missing = again.missing(files)
        for i, file in enumerate(files):
            if str(file) not in missing:
                with contextlib.suppress(DamagedFeaturesError):
                    assert torch.equal(again.features_of([file]), features(i + 1))
        # a new start computes again what is lost, and only that
        last = FeatureStore(folder, "t")
        lost = last.missing(files)
        last.write(last.keys(lost), features(*(files.index(Path(file)) + 1 for file in lost)))
        for i, file in enumerate(files):
            with contextlib.suppress(DamagedFeaturesError):
                assert torch.equal(last.features_of([file]), features(i + 1))


def test_a_damaged_file_is_set_aside_and_said(files, tmp_path, caplog):
    store = FeatureStore(tmp_path / "s", "t")
    store.write(store.keys(files), features(*range(6)))
    (shard,) = store.directory.glob("*.npy")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    again = FeatureStore(tmp_path / "s", "t")
    assert again.missing(files) == files
    assert f"{shard} is damaged" in caplog.text
    assert [path.suffix for path in store.directory.iterdir()] == [".damaged"]
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the checksum of the last row
    again = FeatureStore(tmp_path / "s", "t")
    assert torch.equal(again.features_of(files[:5]), features(*range(5)))
    with pytest.raises(DamagedFeaturesError, match=r"is damaged \(checksum of .*\); it is set aside: start again"):
        again.features_of(files)
    assert FeatureStore(tmp_path / "s", "t").missing(files) == files


def test_files_that_cannot_be_read_keep_their_reason(files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    store = FeatureStore(tmp_path / "s", "t")
    bad = [str(tmp_path / "nowhere.png"), str(tmp_path / "pipe")]
    assert store.missing([*bad, *files], skip_unreadable=True) == files
    with pytest.raises(DataError, match=r"nowhere\.png is missing"):
        store.features_of(bad[:1])
    with pytest.raises(DataError, match=r"pipe is a named pipe; wanted a regular file"):
        store.features_of(bad[1:])
    store.failures[store.keys(files[:1])[0]] = "image x cannot be decoded"
    with pytest.raises(DataError, match=r"image x cannot be decoded"):
        store.features_of(files[:1])


def test_fingerprint_depends_on_weights_names_and_settings():
    weights = {"a": torch.ones(2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    base = tower_fingerprint(weights, "clip", 56)
    assert base == tower_fingerprint(dict(reversed(weights.items())), "clip", 56)
    others = [
        tower_fingerprint(weights | {"a": torch.tensor([1.0, 2.0])}, "clip", 56),
        tower_fingerprint(weights | {"a": torch.ones(1, 2)}, "clip", 56),
        tower_fingerprint({"c": weights["a"], "b": weights["b"]}, "clip", 56),
        tower_fingerprint(weights, "clip", 64),
    ]
    assert len({base, *others}) == 5


def test_keys_are_hashes_of_contents(files):
    assert image_digest(files[0]) == "01d448afd928065458cf670b60f5a594d735af0172c8d67f22a81680132681ca"
