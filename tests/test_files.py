"""Typed fields of other programs' JSON, errors that name the file, and texts that are replaced at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.files import Fields, errors_named, read_json
from tests.foreign_files import JSON_VALUES, attempt

KINDS: list[type] = [bool, int, float, str, list, dict]


@given(value=JSON_VALUES, kind=st.sampled_from(KINDS))
def test_a_field_has_its_type_or_is_named(value: Any, kind: type) -> None:
    fields = Fields({"key": value}, "file.json", "part.")
    got, error = attempt(lambda: fields.get("key", kind))
    if error is None:
        assert got == value
        assert value is None or type(got) is kind
        return
    assert "file.json: part.key must be " in error
    assert type(value).__name__ in error
    assert value is not None
    assert type(value) is not kind or kind is float  # (a float may be NaN)


@pytest.mark.parametrize("kind", KINDS)
def test_null_counts_as_absent(kind: type) -> None:
    fields = Fields({"key": None}, "file.json")
    assert "key" not in fields
    assert fields.get("key", kind) is None
    assert fields.get("key", kind, kind(3) if kind in (int, float, str) else kind()) is not None
    with pytest.raises(ConfigError, match=r"file.json: key is missing; it must be "):
        fields.require("key", kind)
    assert fields.below("key").values == {}
    assert Fields(None, "file.json").values == {}


def test_lists() -> None:
    fields = Fields({"three": [1, 2.5, 3], "mixed": [1, "2"]}, "f")
    assert fields.items("three", float, 3) == [1.0, 2.5, 3.0]
    with pytest.raises(ConfigError, match=r"f: three must be a list of 2, got \[1, 2.5, 3\]"):
        fields.items("three", float, 2)
    with pytest.raises(ConfigError, match=r"f: mixed\[1\] must be an integer, got '2' \(str\)"):
        fields.items("mixed", int)


@given(content=st.one_of(st.binary(max_size=40), JSON_VALUES.map(lambda value: json.dumps(value).encode())))
def test_any_content_is_an_object_or_a_named_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    value, error = attempt(lambda: read_json(path))
    assert str(path) in error if error else value == json.loads(content)


def test_what_json_files_may_be(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(path) == {}  # with a byte order mark
    for content in ("[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 10_000 + "}"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"config.json is not valid JSON"):
            read_json(path, DataError)
    path.write_text('{"auto_map": null}')
    assert read_json(path) == {"auto_map": None}
    path.write_text('{"auto_map": {"AutoConfig": "mine.Config"}}')
    with pytest.raises(CheckpointError, match=r"config.json: auto_map asks for Python code .* never run: remove"):
        read_json(path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(CheckpointError, match="none is missing"):
        read_json(tmp_path / "none")


class _Panic(BaseException):
    pass


@pytest.mark.parametrize("reason", [ValueError("bad"), KeyError("k"), _Panic("p"), OSError(5, "Input/output error")])
def test_every_exception_of_a_library_gets_the_name(reason: BaseException) -> None:
    with pytest.raises(DataError, match=r"^some.file cannot be read: ") as caught, errors_named("some.file", DataError):
        raise reason
    assert caught.value.__cause__ is reason
    for passes in (KeyboardInterrupt(), SystemExit(1), ConfigError("ours")):
        with pytest.raises(type(passes)), errors_named("some.file", DataError):
            raise passes
