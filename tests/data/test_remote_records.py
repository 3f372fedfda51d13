"""Data sets behind addresses: the same batches as here, whichever kind they are; a changed one is copied again."""

from __future__ import annotations

import shutil

import pytest

from parrot_sys.data.config import DataConfig
from parrot_sys.data.loader import ParrotDataLoader
from parrot_sys.data.stream.config import StreamConfig
from parrot_sys.data.stream.loader import StreamLoader, StreamRanks
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


def test_files_of_columns_are_found_behind_addresses(processor, bucket, tmp_path):
    """Beside a folder, in it, and in the folder of a pattern; for streams too."""
    base, _ = bucket
    beside = WRITERS["mapped"](base / "b/columns/inner", RECORDS, FILES)
    columns = beside.with_name("set.parquet.columns.yaml")
    inner = columns.rename(beside.with_name("columns.yaml"))
    for address in ("s3://b/columns/inner", "s3://b/columns/inner/*.parquet"):
        assert make_loader(processor, tmp_path, address).samples_per_epoch == 6
        assert streamed(processor, tmp_path, address) == {f"set:r{i}" for i in range(6)}
    inner.rename(beside.parent.with_name("inner.columns.yaml"))
    assert make_loader(processor, tmp_path / "other", "s3://b/columns/inner").samples_per_epoch == 6
    assert streamed(processor, tmp_path / "other", "s3://b/columns/inner") == {f"set:r{i}" for i in range(6)}


def streamed(processor, folder, address):
    stream = StreamConfig(enabled=True, buffer=2, open_shards=1)
    config = DataConfig(
        paths=(address,), names=("set",), cache_dir=str(folder / "streamed"), remote=QUICK, stream=stream
    )
    loader = StreamLoader(
        config,
        processor,
        num_visual_rows=ROWS,
        max_seq_len=512,
        global_batch_size=1,
        ranks=StreamRanks(rank=0, size=1, most=int),
    )
    steps = iter(loader)
    found = {name for _ in range(6) for batch in next(steps) for name in batch.record_ids}
    steps.close()
    return found


def test_two_files_of_one_name_are_not_taken_for_one(processor, bucket, tmp_path):
    base, _ = bucket
    for name in ("x", "y"):
        WRITERS["jsonl"](base / f"b/twice/{name}", RECORDS, FILES)
    with pytest.raises(DataError, match=r"matches s3://b/twice/x/set\.jsonl and s3://b/twice/y/set\.jsonl, and only"):
        make_loader(processor, tmp_path, "s3://b/twice/*/set.jsonl")


def test_splits_behind_an_address_are_named_to_a_stream(processor, bucket, tmp_path):
    base, _ = bucket
    WRITERS["hf datasets"](base / "b/splits/train", RECORDS, FILES)
    (base / "b/splits/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"s3://b/splits has several splits: name one, such as s3://b/splits/train"):
        streamed(processor, tmp_path, "s3://b/splits")
    assert streamed(processor, tmp_path, "s3://b/splits/train") == {f"set:r{i}" for i in range(6)}
