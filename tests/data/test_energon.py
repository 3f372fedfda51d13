"""energon folders: kinds of samples, splits, exclusions."""

from __future__ import annotations

import json

import pytest
import yaml

from parrot_sys.data.records import parse_record
from parrot_sys.data.sources.energon import expand_braces
from parrot_sys.data.sources.registry import open_source
from parrot_sys.errors import ConfigError, DataError
from tests.data.comparing import PICTURES
from tests.data.picture_archives import write_tar


def energon(base, members, dataset, **split):
    write_tar(base / "s/0.tar", members)
    (base / ".nv-meta").mkdir()
    (base / ".nv-meta/dataset.yaml").write_text(yaml.safe_dump(dataset))
    (base / ".nv-meta/split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": ["s/0.tar"]}} | split))
    return base


ENERGON = {"__module__": "megatron.energon"}


@pytest.mark.parametrize(
    ("dataset", "turns"),
    [
        (
            {
                "sample_type": ENERGON | {"__class__": "CaptioningSample"},
                "field_map": {"image": "jpg", "caption": "txt"},
            },
            [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}],
        ),
        (
            ENERGON
            | {
                "__class__": "VQAWebdataset",
                "field_map": {"image": "png,jpg", "context": "json[q]", "answers": "json[a]"},
            },
            [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "b"}],
        ),
        (
            {
                "sample_type": ENERGON | {"__class__": "MultiChoiceVQASample"},
                "field_map": {
                    "image": "jpg",
                    "context": "json[q]",
                    "choices": "json[a]",
                    "correct_choice_idx": "json[i][0]",
                },
            },
            [{"from": "human", "value": "<image>\nWhat?", "input": "b, c"}, {"from": "gpt", "value": "c"}],
        ),
    ],
)
def test_samples_of_energon(tmp_path, dataset, turns):
    members = {
        "k.jpg": PICTURES[1],
        "k.txt": b" yes\n",
        "k.json": json.dumps({"q": "What?", "a": ["b", "c"], "i": [1]}),
    }
    members["k.json"] = members["k.json"].encode()
    source = open_source(energon(tmp_path / "e", members, dataset))
    (made,) = source.records()
    assert (made["id"], made["conversations"]) == ("k", turns)
    assert source.pictures().picture(made["image"]).open().read() == PICTURES[1]
    assert parse_record(made, 0, source.path).images


def test_splits_and_exclusions_of_energon(tmp_path):
    captions = {
        "sample_type": ENERGON | {"__class__": "CaptioningSample"},
        "field_map": {"image": "jpg", "caption": "t"},
    }
    base = energon(
        tmp_path / "e",
        {f"{i}.{ending}": b"x" for i in range(4) for ending in ("jpg", "txt")},
        captions,
        exclude=["s/0.tar/{1,2}"],
    )
    captions["field_map"]["caption"] = "txt"
    (base / ".nv-meta/dataset.yaml").write_text(yaml.safe_dump(captions))
    assert [each["id"] for each in open_source(base).records()] == ["0", "3"]
    with pytest.raises(DataError, match=r"has no split 'val'; it has train \(.*e#SPLIT\)"):
        open_source(base.with_name("e#val")).state()
    before = open_source(base).digest()
    (base / ".nv-meta/split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": ["s/0.tar"]}, "exclude": []}))
    assert open_source(base).digest() != before
    assert len(list(open_source(base).records())) == 4
    (base / ".nv-meta/split.yaml").write_text(yaml.safe_dump({"split_parts": {"train": ["../x.tar"]}}))
    with pytest.raises(DataError, match=r"the shard \.\./x\.tar leads out of the folder"):
        open_source(base).state()


@pytest.mark.parametrize("name", ["OCRSample", "CaptioningSample"])
def test_samples_of_energon_that_have_no_record(tmp_path, name):
    dataset = {"sample_type": ENERGON | {"__class__": name}, "field_map": {"image": "jpg"}}
    base = energon(tmp_path / "e", {"k.jpg": b"x"}, dataset)
    with pytest.raises(ConfigError, match=rf"samples of {name} with the fields \['image'\] have no record; .*columns"):
        list(open_source(base).records())
    (base / "columns.yaml").write_text(
        "conversations: [{from: human, value: <image>}, {from: gpt, value: x}]\nimage: jpg"
    )
    assert len(list(open_source(base).records())) == 1


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{9..11}", ["9", "10", "11"]),
        ("s{2..1}/{a,b}.tar", ["s2/a.tar", "s2/b.tar", "s1/a.tar", "s1/b.tar"]),
        ("{x}", ["{x}"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names
