"""Pictures behind addresses: the same batches as from files, also when the storage fails for a while."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.config import DataConfig
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.errors import ConfigError, DataError, StorageError
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.picture_archives import shards, write_files, write_parquet, write_tar
from tests.data.remote_pictures import GS, QUICK, addresses, storage

NAMES = [f"deep {i % 2}/ü{i}.png" for i in range(6)]
ROOTS = ("files", "tars", "tars/*.tar", "tars/x-1.tar", "parquet", "parquet/p.parquet")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """(folder that is served, server)"""
    base = tmp_path_factory.mktemp("remote")
    pictures = dict(zip(NAMES, PICTURES, strict=False))
    write_files(base / "b/files", pictures)
    for i, part in enumerate(shards(pictures, 2)):
        write_tar(base / f"b/tars/x-{i}.tar", part)
    write_parquet(base / "b/parquet/p.parquet", pictures)
    with storage(base) as server:
        yield base, server


def make_loader(processor, folder, root, *, seed=1):
    path = folder / "set.json"
    path.write_text(json.dumps([record(i, NAMES[i % 6 : i % 6 + 1 + i % 2]) for i in range(8)]), encoding="utf-8")
    config = DataConfig(
        paths=(str(path),),
        image_roots=(str(root),),
        on_bad_sample="skip",
        num_workers=3,
        seed=seed,
        cache_dir=str(folder / "cache"),
        remote=QUICK,
    )
    return ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=2)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    faults=st.lists(st.sampled_from(["", "503", "500", "429", "drop", "short"]), max_size=3),
    seed=st.integers(0, 99),
    at=st.integers(0, 2),
)
@pytest.mark.parametrize("protocol", ["s3", GS])
def test_batches_and_resume_are_those_from_files(processor, bucket, tmp_path_factory, protocol, faults, seed, at):
    base, server = bucket
    folder = tmp_path_factory.mktemp("run")
    wanted = list(make_loader(processor, folder, base / "b/files", seed=seed))
    roots = [addresses(server, f"b/{name}")[protocol] for name in ("files", "tars", "parquet/p.parquet")]
    for root in [*roots, addresses(server, "b/files")["http"]]:
        server.fail(*faults)
        loader = make_loader(processor, folder, root, seed=seed)
        steps = iter(loader)
        first = [next(steps) for _ in range(at + 1)]
        state = loader.state_dict()
        steps.close()
        again = make_loader(processor, folder, root, seed=seed)
        again.load_state_dict(state)
        assert_same([*first, *again], wanted)


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        *(("s3", name) for name in ROOTS),
        *(pytest.param("gs", name, marks=GS.marks) for name in ROOTS),
        ("http", "files"),
        ("http", "tars/x-1.tar"),
        ("http", "parquet/p.parquet"),
    ],
)  # (web servers list no files)
def test_a_second_reading_comes_from_the_disk(bucket, tmp_path, name, protocol):
    base, server = bucket
    contents = {each: (base / "b/files" / each).read_bytes() for each in NAMES}
    if name.endswith("x-1.tar"):
        contents = {each: contents[each] for each in NAMES[1::2]}

    def read():
        server.requests()
        root = ImageRoot(addresses(server, f"b/{name}")[protocol], cache_dir=tmp_path, remote=QUICK)
        for each, data in contents.items():
            assert root.problem(each) is None
            with root.picture(each).open() as file:
                assert file.read() == data
        assert root.problem("../x.png") is not None
        return sum(" bytes=" in each for each in server.requests())

    assert read() > 0
    assert read() == 0


FAULTS = {"503": "SlowDown|503|Service Unavailable", "drop": "", "short": "", "slow": "no answer within 0.5 s"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("protocol", ["s3", GS, "http"])
def test_a_storage_that_stays_away_ends_the_run_with_its_name(processor, bucket, tmp_path, fault, protocol):
    """Under `skip` too: a picture that cannot be fetched now is no bad picture."""
    _, server = bucket
    quick = type(QUICK)(first_wait=0.01, attempts=3, timeout=0.5 if fault == "slow" else 5)
    name = "deep 0/ü0.png"
    url = addresses(server, "b/files")[protocol]
    root = ImageRoot(url, cache_dir=tmp_path, remote=quick)
    server.fail(*[fault] * 99, only="ü0.png")
    start = time.monotonic()
    try:
        with pytest.raises(StorageError, match=f"ü0.png cannot be read: 3 attempts failed, .*({FAULTS[fault]})"):
            root.picture(name).open()
        assert time.monotonic() - start < 10
    finally:
        server.fail()
    with root.picture(name).open() as file:
        assert file.read() == PICTURES[0]


@pytest.mark.parametrize("protocol", ["s3", GS, "http"])
@pytest.mark.parametrize("fault", ["403", "whole"])
def test_what_another_attempt_does_not_change_is_tried_once(bucket, tmp_path, protocol, fault):
    _, server = bucket
    root = ImageRoot(addresses(server, "b/tars/x-0.tar")[protocol], cache_dir=tmp_path, remote=QUICK)
    picture = root.picture(NAMES[0])
    server.requests()
    server.fail(*[fault] * 9)
    try:
        wanted = (
            "the server ignores ranges"
            if fault == "whole"
            else "cannot be read: .*Error.*; check the address and the keys"
        )
        with pytest.raises(StorageError, match=rf"x-0\.tar.*{wanted}"):
            picture.open()
    finally:
        server.fail()
    assert len(server.requests()) == 1


@pytest.mark.parametrize("protocol", ["s3", GS, "http"])
def test_a_missing_picture_is_a_bad_sample(processor, bucket, tmp_path, protocol):
    _, server = bucket
    root = ImageRoot(addresses(server, "b/files")[protocol], cache_dir=tmp_path, remote=QUICK)
    if protocol != "http":
        assert f"{protocol}://b/files/none.png is missing" in root.problem("none.png")
    with pytest.raises(DataError, match="is missing") as caught:
        root.picture("none.png").open()
    assert not isinstance(caught.value, StorageError)


def test_a_changed_file_is_read_anew_and_a_changed_archive_stops_the_run(bucket, tmp_path, monkeypatch):
    base, _ = bucket
    root = ImageRoot("s3://b/files", cache_dir=tmp_path, remote=QUICK)
    write_files(base / "b/files", {"other.png": b"one"})
    write_tar(base / "b/other.tar", {"other.png": b"one"})
    archive = ImageRoot("s3://b/other.tar", cache_dir=tmp_path, remote=QUICK)
    for data in (b"one", b"two"):
        write_files(base / "b/files", {"other.png": data})
        assert root.picture("other.png").open().read() == data
    assert archive.picture("other.png").open().read() == b"one"
    write_tar(base / "b/other.tar", {"other.png": b"two"})
    now = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(StorageError, match=r"s3://b/other\.tar has changed since its index was read"):
        archive.picture("other.png").open()
    assert ImageRoot("s3://b/other.tar", cache_dir=tmp_path, remote=QUICK).picture("other.png").open().read() == b"two"


@pytest.mark.parametrize(
    ("root", "error", "reason"),
    [
        ("s3://b/none.tar", DataError, r"image archive s3://b/none\.tar is missing"),
        ("s3://b/none/*.tar", DataError, r"image root s3://b/none/\*\.tar matches no archive"),
        ("nowhere://b/x.tar", ConfigError, r"nowhere://b/x\.tar cannot be opened: .*nowhere.*; fix: install"),
    ],
)
def test_roots_that_are_none(bucket, tmp_path, root, error, reason):
    with pytest.raises(error, match=reason):
        ImageRoot(root, cache_dir=tmp_path, remote=QUICK)
    assert "is missing" in ImageRoot("s3://b/none", cache_dir=tmp_path, remote=QUICK).problem("x.png")
