"""Record files of any size, encoding and state: what is right is read, what is wrong costs as little as it can."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data import record_files
from parrot_sys.data.record_files import read_raw_records
from parrot_sys.data.records import parse_record
from parrot_sys.errors import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 10**20) | st.text(alphabet=st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from("abc"), JSON, max_size=3) | JSON, max_size=6)


@settings(max_examples=120, deadline=None)
@given(
    records=RECORDS,
    chunk=st.sampled_from([1, 2, 7, 64, 1 << 20]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_lists_and_lines_are_read_whole(tmp_path_factory, records, chunk, encoding, indent, ascii_only, newline):
    folder = tmp_path_factory.mktemp("files")
    whole = json.dumps(records, indent=indent, ensure_ascii=ascii_only).replace("\n", newline)
    (folder / "set.json").write_bytes(f"{newline}{whole} ".encode(encoding))
    lines = newline.join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    (folder / "set.jsonl").write_bytes(f"{lines}{newline}{newline}".encode(encoding))
    with patch.object(record_files, "_CHUNK", chunk):
        assert list(read_raw_records(folder / "set.json")) == records
        assert list(read_raw_records(folder / "set.jsonl")) == records
        if len(records) > 1 and isinstance(records[0], dict):
            (folder / "lines.json").write_bytes(lines.encode(encoding))
            assert list(read_raw_records(folder / "lines.json")) == records


@settings(max_examples=80, deadline=None)
@given(records=RECORDS.filter(bool), cut=st.integers(1, 200), chunk=st.sampled_from([1, 16, 1 << 20]))
def test_a_list_that_is_cut_is_an_error(tmp_path_factory, records, cut, chunk):
    path = tmp_path_factory.mktemp("files") / "set.json"
    whole = json.dumps(records)
    path.write_text(whole[: -min(cut, len(whole) - 1)])
    with patch.object(record_files, "_CHUNK", chunk), pytest.raises(DataError, match=r"set\.json is no valid JSON"):
        list(read_raw_records(path))


GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ok"}]}


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_bytes_that_are_no_utf8_cost_one_record(name, tmp_path):
    good = json.dumps(GOOD).encode()
    parts = [good, good.replace(b"Hi", b"caf\xe9"), good.replace(b"ok", b"\\ud83d"), good]
    (tmp_path / name).write_bytes(b"[" + b",\n".join(parts) + b"]" if name == "set.json" else b"\n".join(parts))
    raw = list(read_raw_records(tmp_path / name))
    assert len(raw) == 4
    wrong = []
    for index, record in enumerate(raw):
        try:
            parse_record(record, index, tmp_path / name)
        except DataError as error:
            wrong.append(str(error).removeprefix(f"{tmp_path / name}: "))
    assert wrong == [
        "record 1: turn 0: character 3 is no valid text: the byte 0xE9, which has no UTF-8",
        "record 2: turn 1: character 0 is no valid text: half a character (U+D83D), which has no UTF-8",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
        (b"[{}, {]", "in record 1"),
        (b"[{}] []", "something follows"),
        (b"[{} {}]", "after record 0, got {"),
        (b"\xff\xfe[\x00\x00", "truncated data"),
    ],
)
def test_broken_files_are_named(content, reason, tmp_path):
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"set\.json is no valid JSON: .*{reason}"):
        list(read_raw_records(tmp_path / "set.json"))


def test_what_is_broken_early_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "set.json"
    path.write_text("[{}, {]" + " " * (5 << 20))
    read = []
    with pytest.raises(DataError, match="in record 1"):
        list(read_raw_records(path, read.append))
    assert max(read) < 3 << 20
