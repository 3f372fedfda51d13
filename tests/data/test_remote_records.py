"""Data sets behind addresses: the same batches as here, whichever kind they are; a changed one is copied again."""

from __future__ import annotations

import shutil

import pytest

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.errors import DataError, StorageError
from tests.data.comparing import PICTURES, ROWS, assert_same, record
from tests.data.record_sets import WRITERS
from tests.data.remote_pictures import QUICK, storage

FILES = {f"{i}.png": PICTURES[i] for i in (0, 2)}
RECORDS = [record(i, sorted(FILES)[: i % 3]) for i in range(6)]
KINDS = ("json", "jsonl", "parquet", "hf datasets", "webdataset", "energon", "mapped")


def make_loader(processor, folder, path, name="set"):
    config = DataConfig(paths=(str(path),), names=(name,), cache_dir=str(folder / "cache"), remote=QUICK)
    return ParrotDataLoader(config, processor, num_visual_rows=ROWS, max_seq_len=512, global_batch_size=2)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    base = tmp_path_factory.mktemp("remote")
    with storage(base) as server:
        yield base, server


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_files(processor, bucket, tmp_path, kind):
    base, server = bucket
    path = WRITERS[kind](base / "b" / kind.replace(" ", "-"), RECORDS, FILES)
    wanted = list(make_loader(processor, tmp_path / "here", path))
    address = f"s3://{path.relative_to(base).as_posix()}"
    server.fail("503", "short")
    assert_same(list(make_loader(processor, tmp_path, address)), wanted)
    server.requests()
    stopped, again = (make_loader(processor, tmp_path, address) for _ in range(2))  # from the copy
    running = iter(stopped)
    first = [next(running)]
    again.load_state_dict(stopped.state_dict())
    running.close()
    assert_same([*first, *again], wanted)
    assert not [each for each in server.requests() if " bytes=" in each and "png" not in each]


def test_a_changed_data_set_is_copied_again(processor, bucket, tmp_path):
    base, _ = bucket
    folder = WRITERS["parquet"](base / "b/changing", RECORDS, FILES)
    shutil.copy(folder / "train-00000.parquet", folder / "more.parquet")
    before = make_loader(processor, tmp_path, "s3://b/changing/*.parquet")
    assert before.samples_per_epoch == 9
    (folder / "more.parquet").unlink()
    WRITERS["parquet"](base / "b/changing", RECORDS[:4], FILES)
    after = make_loader(processor, tmp_path, "s3://b/changing/*.parquet")
    assert after.samples_per_epoch == 4


def test_what_is_missing_or_away_is_named(processor, bucket, tmp_path):
    base, server = bucket
    with pytest.raises(DataError, match=r"data set s3://b/none\.jsonl is missing"):
        make_loader(processor, tmp_path, "s3://b/none.jsonl")
    WRITERS["jsonl"](base / "b/away", RECORDS, FILES)
    server.fail(*["503"] * 99)
    try:
        with pytest.raises(StorageError, match=r"s3://b/away/set\.jsonl cannot be read: 4 attempts failed"):
            make_loader(processor, tmp_path, "s3://b/away/set.jsonl")
    finally:
        server.fail()
