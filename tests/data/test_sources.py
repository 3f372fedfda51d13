"""Sources of records: what is read by place is what a pass over the whole data set gives, wherever it is read."""

from __future__ import annotations

import json
import os
import pickle
import random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data import record_files
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import DataError, StorageError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 10**20) | st.text(alphabet=st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def plain(records):
    """Records with the texts of errors in place of errors, which are never equal."""
    return [str(record) if isinstance(record, DataError) else record for record in records]


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(JSON, max_size=6),
    name=st.sampled_from(["set.json", "set.jsonl", "lines.json"]),
    chunk=st.sampled_from([1, 7, 64, 1 << 20]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\n\n "]),
    seed=st.integers(0, 99),
)
def test_records_are_the_same_by_place_and_in_one_pass(
    tmp_path_factory, records, name, chunk, encoding, ascii_only, newline, seed
):
    folder = tmp_path_factory.mktemp("files")
    if name == "set.json":
        text = newline + json.dumps(records, indent=1, ensure_ascii=ascii_only).replace("\n", newline)
    else:
        # (two objects at least make a file of lines recognisable under the name .json)
        records = [{"a": 1}, {}, *records]
        text = newline + newline.join(json.dumps(record, ensure_ascii=ascii_only) for record in records) + newline
    (folder / name).write_bytes(text.encode(encoding))
    with patch.object(record_files, "_CHUNK", chunk):
        source = open_source(folder / name)
        places = list(source.scan())
        assert list(source.records()) == records
    order = random.Random(seed).sample(range(len(records)), len(records))
    assert source.read([places[i] for i in order]) == [records[i] for i in order]
    other = pickle.loads(pickle.dumps(source))
    assert other.read(places) == records
    assert (other.digest(), other.state(), other.size()) == (
        source.digest(),
        source.state(),
        len(text.encode(encoding)),
    )


def test_a_broken_line_and_bytes_that_are_no_utf8_are_the_same_by_place(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\n  \n{"a": "caf\xe9"}\n["x"]')
    source = open_source(path)
    read = source.read(list(source.scan()))
    assert plain(read) == plain(source.records())
    assert [type(each) for each in read] == [dict, DataError, dict, list]


@pytest.mark.parametrize("how", ["longer", "same size"])
def test_a_file_that_changes_in_use_is_noticed(tmp_path, how):
    path = tmp_path / "set.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    source = open_source(path)
    source.state()
    places = list(source.scan())
    assert source.read(places) == [{"a": 1}, {"a": 2}]
    with path.open("r+b") as file:
        file.write(b'{"a": 3}\n{"a": 4}\n' + (b'{"a": 5}\n' if how == "longer" else b""))
    os.utime(path, ns=(0, 0))
    with pytest.raises(StorageError, match=r"data set .*set\.jsonl has changed since its index was read: start again"):
        source.read(places)


def test_a_missing_file_is_named(tmp_path):
    source = open_source(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"data set .*none\.json is missing; data\.paths must name files, folders"):
        source.state()
    with pytest.raises(DataError, match=r"is a folder without Parquet, Arrow or tar files; name its JSON files one by"):
        open_source(tmp_path).state()
