"""Every kind of data set gives the same records and pictures, by place and in any order."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pyarrow
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from parrot_sys.data.image_sources.base import ImageSource
from parrot_sys.data.records import parse_record
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import ConfigError, DataError, StorageError
from tests.data.comparing import PICTURES, record
from tests.data.picture_archives import write_tar
from tests.data.record_sets import WRITERS, write_hf, write_parquet_set

FILES = {f"{i}.{ending}": PICTURES[i] for i, ending in enumerate(("png", "jpg", "png", "webp", "bmp"))}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)


@st.composite
def record_lists(draw):
    records = []
    for number in range(draw(st.integers(1, 9))):
        names = draw(st.lists(st.sampled_from(sorted(FILES)), max_size=3, unique=True).map(sorted))
        made = record(number, names)
        made["conversations"][1]["value"] = draw(TEXT)
        made["lang"] = draw(st.sampled_from(["en", "zh", None]))
        records.append(made)
    return records


def parsed(source, raw, number):
    return parse_record(raw, number, source.path)


def content(root: Path, own: ImageSource | None, name: str) -> bytes:
    if own is not None and own.problem(name) is None:
        picture = own.picture(name)
        assert str(picture)
        with picture.open() as file:
            return file.read()
    return (root / name).read_bytes()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(records=record_lists(), data=st.data())
@pytest.mark.parametrize("kind", WRITERS)
def test_records_and_pictures_are_those_of_json(kind, records, data):
    with tempfile.TemporaryDirectory() as folder:
        path = WRITERS[kind](Path(folder) / "set", records, FILES)
        source = open_source(path)
        places = list(source.scan())
        assert len(places) == len(records)
        order = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=12))
        moved = pickle.loads(pickle.dumps(source))
        for reader in (source, moved):
            for number, raw in zip(order, reader.read([places[i] for i in order]), strict=True):
                got, wanted = parsed(source, raw, number), parse_record(records[number], number, Path("x"))
                assert (got.turns, got.language, got.record_id) == (wanted.turns, wanted.language, wanted.record_id)
                pictures = [content(path.parent if path.is_file() else path, reader.pictures(), n) for n in got.images]
                assert pictures == [FILES[name] for name in records[number]["image"]]
        assert [parsed(source, raw, i).turns for i, raw in enumerate(source.records())] == [
            parse_record(each, i, Path("x")).turns for i, each in enumerate(records)
        ]
        again = [parsed(moved, raw, 0).images for raw in moved.read(places)]
        assert again == [parsed(source, raw, 0).images for raw in source.read(places)]


RECORDS = [{**record(i, sorted(FILES)[: i % 3]), "lang": "en"} for i in range(7)]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_digest_is_of_the_content(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "one" / "set", RECORDS, FILES)
    digest = open_source(path).digest()
    assert digest == open_source(path).digest()
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    copy = tmp_path / "other" / path.relative_to(tmp_path / "one")
    for file in (each for each in copy.parent.rglob("*") if each.is_file()):
        os.utime(file, (1, 1))
    assert open_source(copy).digest() == digest
    assert open_source(copy).state() != open_source(path).state()
    changed = [
        *RECORDS[:-1],
        {
            **RECORDS[-1],
            "conversations": [*RECORDS[0]["conversations"][:1], {"from": "gpt", "value": "Another answer."}],
        },
    ]
    other = WRITERS[kind](tmp_path / "third" / "set", changed, FILES)
    assert open_source(other).digest() != digest


@pytest.mark.parametrize("kind", WRITERS)
def test_a_changed_data_set_is_not_read_by_old_places(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "set", RECORDS, FILES)
    source = open_source(path)
    state, places = source.state(), list(source.scan())
    source.read(places[:1])
    shutil.rmtree(tmp_path / "set")
    WRITERS[kind](tmp_path / "set", RECORDS[::-1] * 2, FILES)
    assert open_source(path).state() != state
    with pytest.raises(StorageError, match="has changed since its index was read"):
        # (A JSON file that is open stays what it was; who opens it anew sees the change.)
        (pickle.loads(pickle.dumps(source)) if kind.startswith("json") else source).read(places)


@pytest.mark.parametrize("kind", ["parquet", "hf datasets", "webdataset", "arrow", "energon"])
def test_progress_goes_to_the_end(tmp_path, kind):
    source = open_source(WRITERS[kind](tmp_path / "set", RECORDS, FILES))
    for call in (source.scan, source.digest):
        passed = []
        for _ in call(passed.append):
            pass
        assert sum(passed) == source.size() or kind == "energon"  # (whose size has the files of .nv-meta)


def write_table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def columns(path, **values):
    path.with_name(path.name + ".columns.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))


def test_turns_are_made_of_columns(tmp_path):
    path = write_table(
        tmp_path / "qa.parquet",
        question=["What? {answer}", "Why?", "<image>"],
        answers=[["a", "b"], ["c"], ["d"]],
        hint=[None, "think", "look"],
        image=["1.png", None, None],
    )
    columns(
        path,
        image="image",
        conversations=[
            {"from": "human", "value": "<image>\n{question}", "input": "{hint}"},
            {"from": "gpt", "value": "{answers.0}: {answers}"},
        ],
    )
    first, second, third = open_source(path).records()
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nWhat? {answer}", "input": ""},  # what a column holds is not read again
        {"from": "gpt", "value": 'a: ["a", "b"]'},
    ]
    assert first["image"] == "1.png"
    assert second["image"] is None
    assert third["conversations"][0]["input"] == "look"


def test_columns_work_for_json_too_and_a_missing_one_costs_one_record(tmp_path):
    path = tmp_path / "alpaca.json"
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.", "output": "3"}, 7]
    path.write_text(json.dumps(rows))
    columns(
        path,
        conversations=[
            {"from": "human", "value": "{instruction}", "input": "{input}"},
            {"from": "gpt", "value": "{output}"},
        ],
    )
    good, bad, wrong = open_source(path).records()
    assert parse_record(good, 0, path).turns[0]["input"] == "1 2"
    assert isinstance(bad, DataError)
    assert str(bad) == "has no column 'input'; it has instruction, output"
    assert wrong == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversation: x", r"'conversation' is no field of a record; .*; did you mean conversations\?"),
        ("id: x", r"must say where the turns are: conversations"),
        ("conversations: 7", r"conversations must name a column, got 7"),
        ("conversations: [{from: human}]", r"conversations\[0\] must have from, value and perhaps input"),
        ("conversations: [{from: human, value: 7}]", r"conversations\[0\] must hold texts"),
        ("id: [a]\nconversations: x", r"id must name a column"),
        ("- a", r"must hold a mapping of settings"),
    ],
)
def test_wrong_files_of_columns(tmp_path, text, message):
    path = write_table(tmp_path / "set.parquet", x=[1])
    path.with_name("set.parquet.columns.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"set\.parquet\.columns\.yaml.*{message}"):
        list(open_source(path).records())


def test_other_forms_of_pictures_and_turns_in_tables(tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    turns = [{"from": ["human", "gpt"], "value": ["<image>", "a"]}] * 4
    table = pyarrow.table(
        {
            "conversations": turns,
            "image": pyarrow.array(
                [{"bytes": b"1", "path": None}, None, {"bytes": b"3", "path": "c"}, {"bytes": b"4", "path": "d"}], kind
            ),
        }
    )
    parquet.write_table(table, tmp_path / "structs.parquet", row_group_size=3)
    source = open_source(tmp_path / "structs.parquet")
    records = list(source.records())
    assert records[0]["conversations"][1] == {"from": "gpt", "value": "a"}
    assert records[1]["image"] is None
    assert [source.pictures().picture(records[i]["image"]).open().read() for i in (0, 2, 3)] == [b"1", b"3", b"4"]
    plain = pyarrow.table({"image": pyarrow.array([b"1", None, b"3"], pyarrow.large_binary()), "x": [1, 2, 3]})
    parquet.write_table(plain, tmp_path / "plain.parquet", row_group_size=2)
    source = open_source(tmp_path / "plain.parquet")
    records = list(source.records())
    assert [record["x"] for record in records] == [1, 2, 3]
    assert records[1]["image"] is None
    assert [source.pictures().picture(records[i]["image"]).open().read() for i in (0, 2)] == [b"1", b"3"]
    paths = pyarrow.array([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}], kind)
    parquet.write_table(pyarrow.table({"image": paths}), tmp_path / "paths.parquet")
    assert [record["image"] for record in open_source(tmp_path / "paths.parquet").records()] == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["cell:0:0:0:none", "cell:9:0:0:images", "cell:0:99:0:images", "x", "cell:a:b:c:d"])
def test_names_that_are_no_cells(tmp_path, name):
    pictures = open_source(write_parquet_set(tmp_path, RECORDS, FILES)).pictures()
    with pytest.raises(DataError, match=r"is no cell of|has no block 9"):
        pictures.picture(name).open()


def test_only_texts_of_a_table_are_read_for_records(tmp_path):
    big = {name: os.urandom(500_000) for name in FILES}
    source = open_source(write_parquet_set(tmp_path, RECORDS, big, files=1, rows=7))
    places = list(source.scan())
    before = bytes_read()
    source.digest()
    source.read(places)
    assert bytes_read() - before < 200_000
    assert (tmp_path / "train-00000.parquet").stat().st_size > 900_000


def bytes_read():
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])


def test_a_folder_of_splits_and_an_order_of_its_own_are_refused(tmp_path):
    write_hf(tmp_path / "d/train", RECORDS, FILES)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"has several splits: name one, such as .*d/train"):
        open_source(tmp_path / "d").state()
    state = json.loads((tmp_path / "d/train/state.json").read_text())
    (tmp_path / "d/train/state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(DataError, match=r"save it after flatten_indices\(\)"):
        open_source(tmp_path / "d/train").state()
    (tmp_path / "d/train/state.json").write_text(json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}))
    with pytest.raises(DataError, match="must list _data_files of this folder"):
        open_source(tmp_path / "d/train").state()


def test_broken_samples_of_a_webdataset_cost_one_record_each(tmp_path):
    good = json.dumps(record(0, [])).encode()
    members = {
        "a.json": good,
        "b.json": b"{",
        "c.txt": b"caption",
        "d.json": b"\xff",
        "e.json": b"[1]",
        "e.jpg": PICTURES[1],
        "f.json": good,
    }
    source = open_source(write_tar(tmp_path / "x.tar", members))
    records = list(source.records())
    assert [isinstance(each, DataError) for each in records] == [False, True, True, True, True, False]
    assert "b.json is no valid json" in str(records[1])
    assert "has no .json with a record; say in a file of columns" in str(records[2])


def test_samples_of_a_webdataset_by_their_endings(tmp_path):
    members = {"x/1.jpg": PICTURES[1], "x/1.txt": b"A cat.", "x/2.png": PICTURES[0], "x/2.txt": "Ein Hütte.".encode()}
    path = write_tar(tmp_path / "x.tar", members)
    columns(
        path,
        id="__key__",
        image="jpg",
        conversations=[{"from": "human", "value": "<image>\nSay it."}, {"from": "gpt", "value": "{txt}"}],
    )
    source = open_source(path)
    first, second = source.records()
    assert (first["id"], first["conversations"][1]["value"]) == ("x/1", "A cat.")
    assert source.pictures().picture(first["image"]).open().read() == PICTURES[1]
    assert str(second) == "has no column 'jpg'; it has __key__, png, txt"


def test_pictures_that_the_json_names_are_those_of_the_sample(tmp_path):
    """Also where another shard has one of the same name."""
    for number in range(2):
        made = json.dumps(record(number, ["a.1.png"])).encode()
        write_tar(tmp_path / f"s{number}.tar", {"a.json": made, "a.0.png": b"other", "a.1.png": bytes([number])})
    source = open_source(tmp_path)
    for number, raw in enumerate(source.records()):
        assert source.pictures().picture(raw["image"][0]).open().read() == bytes([number])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", "no file that ends in .parquet is there"),
        ("none-*.tar", "no file that ends in .tar"),
        ("none.json", "is missing"),
    ],
)
def test_data_sets_that_are_not_there(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name).state()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_damaged_files_are_named(tmp_path, kind):
    (tmp_path / f"x.{kind}").write_bytes(b"PAR1 this is none" * 100)
    with pytest.raises(DataError, match=rf"x\.{kind}"):
        list(open_source(tmp_path / f"x.{kind}").scan())
