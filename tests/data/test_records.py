"""Every way in which a record can be wrong has its own message with file, record and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parrot_sys.data.record_files import read_raw_records
from parrot_sys.data.records import parse_record
from parrot_sys.errors import DataError

PATH = Path("data/train.json")


def record(**changes):
    base = {
        "id": "a7",
        "image": "cat.png",
        "lang": "pt",
        "conversations": [{"from": "human", "value": "<image>\nO que é?"}, {"from": "gpt", "value": "Um gato."}],
    }
    return {k: v for k, v in (base | changes).items() if v is not ...}


def turns(*pairs):
    return [{"from": name, "value": value} for name, value in pairs]


QUESTION = ("human", "<image>\nWhat?")


def test_a_record_with_everything():
    parsed = parse_record(record(), 3, PATH)
    assert (parsed.index, parsed.record_id, parsed.language, parsed.images) == (3, "a7", "pt", ("cat.png",))
    assert parsed.turns == tuple(record()["conversations"])


@pytest.mark.parametrize(("stated", "category"), [("faces", "faces"), (..., ""), (None, ""), (7, ""), (["a"], "")])
def test_a_category_is_a_text_and_anything_else_is_somebody_elses(stated, category):
    assert parse_record(record(category=stated), 0, PATH).category == category


def test_defaults():
    parsed = parse_record(
        record(id=..., image=..., lang=..., conversations=turns(("human", "Hi"), ("gpt", "Hello"))),
        3,
        PATH,
        language="ru",
    )
    assert (parsed.record_id, parsed.language, parsed.images) == ("3", "ru", ())


@pytest.mark.parametrize(
    "raw",
    [
        record(image=None, conversations=turns(("human", "Hi"), ("gpt", "Hello"))),
        record(id=0),
        record(image=["a.png", "b.png"], conversations=turns(("human", "<image><image> same?"), ("gpt", "no"))),
        record(conversations=turns(("system", "Be short."), QUESTION, ("gpt", "a"), ("human", "b"), ("gpt", "c"))),
    ],
)
def test_valid_records(raw):
    parse_record(raw, 0, PATH)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (record(image=...), "one <image> marker for each image, got 1 markers and 0 images"),
        (record(conversations=turns(("human", "Hi"), ("gpt", "Hello"))), "got 0 markers and 1 images"),
        (record(image=["a.png", "b.png"]), "got 1 markers and 2 images"),
        (record(image=7), "`image` must be a file name or a list of file names, got 7"),
        (record(image=""), "`image` must be a file name"),
        (record(image=["a.png", None]), "`image` must be a file name"),
        (record(conversations=...), "`conversations` must be a list with at least one turn, got None"),
        (record(conversations=[]), "at least one turn, got \\[\\]"),
        (record(conversations="hi"), "`conversations` must be a list"),
        (record(conversations=["hi"]), "turn 0 must have strings in `from` and `value`, got 'hi'"),
        (record(conversations=[{"from": "human"}]), "turn 0 must have strings in `from` and `value`"),
        (record(conversations=turns(("human", 5))), "turn 0 must have strings"),
        (
            record(conversations=turns(("bot", "<image>"), ("gpt", "x"))),
            "turn 0: `from` must be one of system, human, gpt, user, assistant, got 'bot'",
        ),
        (record(conversations=turns(QUESTION, ("gpt", "  "))), "turn 1: the answer must not be empty"),
        (record(conversations=turns(("human", "x"), ("gpt", "<image>"))), "got 0 markers and 1 images"),
        (record(conversations=turns(QUESTION)), "at least one answer"),
        (record(conversations=turns(("system", "x"))), "got a system turn only"),
        (record(conversations=turns(QUESTION, ("gpt", "a"), ("human", "b"))), "human and gpt in turn"),
        (record(conversations=turns(QUESTION, ("human", "b"), ("gpt", "a"))), "human and gpt in turn"),
        (record(conversations=turns(("gpt", "a"), QUESTION)), "human and gpt in turn"),
        (record(conversations=turns(QUESTION, ("system", "s"), ("gpt", "a"))), "human and gpt in turn"),
        (record(lang=3), "`lang` must be a string, got 3"),
    ],
)
def test_wrong_records(raw, reason):
    with pytest.raises(DataError, match=rf"^data/train\.json: record 4 \(id 'a7'\): .*{reason}"):
        parse_record(raw, 4, PATH)


def test_a_record_that_is_no_object_has_no_id():
    with pytest.raises(DataError, match=r"^data/train\.json: record 4: must be a JSON object, got list$"):
        parse_record([1], 4, PATH)


def test_json_and_jsonl_hold_the_same(write_records):
    records = [record(id=i) for i in range(3)]
    assert list(read_raw_records(Path(write_records(records)))) == records
    assert list(read_raw_records(Path(write_records(records, "set.jsonl")))) == records


def test_a_broken_line_costs_one_record(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(record()) + "\n{broken\n\n" + json.dumps(record()))
    raw = list(read_raw_records(path))
    assert len(raw) == 3
    assert parse_record(raw[2], 2, path)
    with pytest.raises(DataError, match=r"set\.jsonl: record 1: is no valid JSON: Expecting property name"):
        parse_record(raw[1], 1, path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("set.json", "[{}", r"set\.json is no valid JSON: .*one record a line end in \.jsonl"),
        ("set.json", "{}", "must hold a JSON list of records, got dict"),
        ("set.json", None, r"set\.json is missing; data\.paths"),
    ],
)
def test_wrong_files(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_raw_records(tmp_path / name))
