"""What `--data` makes of the data sets that tasks of lm-eval name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parrot_sys.errors import DataError
from parrot_sys.integrations.lm_eval.local_data import loader_from


def asked(root: Path, path: str, *args: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """The call of `datasets.load_dataset`, without arguments that are None."""
    load = loader_from(root, lambda path, **more: (path, more), {"json", "csv", "parquet"})
    called, more = load(path, *args, **kwargs)
    return called, {name: value for name, value in more.items() if value is not None}


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_repository_is_its_copy(tmp_path: Path) -> None:
    folder = file(tmp_path / "allenai" / "ai2_arc" / "README.md").parent
    assert asked(tmp_path, "allenai/ai2_arc", "ARC-Easy") == (str(folder), {"name": "ARC-Easy"})
    found = asked(tmp_path, path="allenai/ai2_arc", name=None, data_files={"test": "a/b.csv"}, column_names=["x"])
    assert found == (str(folder), {"data_files": {"test": "a/b.csv"}, "column_names": ["x"]})


def test_files_of_a_task_of_ones_own_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files in ("own.jsonl", {"test": ["a.jsonl", "b.jsonl"]}, None):
        expected = {} if files is None else {"data_files": files}
        assert asked(tmp_path, "json", data_files=files) == ("json", expected)
    assert asked(tmp_path, "csv", None, "folder") == ("csv", {"data_dir": "folder"})
    folder = file(tmp_path / "own" / "test.csv").parent
    assert asked(tmp_path / "data", str(folder)) == (str(folder), {})
    monkeypatch.chdir(tmp_path)
    assert asked(tmp_path / "data", "own") == ("own", {})


def test_files_of_a_repository_are_those_of_its_copy(tmp_path: Path) -> None:
    copy = file(tmp_path / "EleutherAI" / "arithmetic" / "data" / "one.jsonl")
    for address in ("hf://datasets/EleutherAI/arithmetic", "hf://datasets/EleutherAI/arithmetic@main"):
        found = asked(tmp_path, "json", data_files={"validation": f"{address}/data/one.jsonl"})
        assert found == ("json", {"data_files": {"validation": str(copy)}})
    with pytest.raises(DataError, match=r"no folder corypaik/prost.*hf download"):
        asked(tmp_path, "json", data_files={"test": ["hf://datasets/corypaik/prost/data/default.jsonl"]})


@pytest.mark.parametrize("address", ["https://example.org/a.jsonl", "s3://bucket/a.jsonl", "hf://buckets/a/b/c.jsonl"])
def test_other_addresses_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match=f"{address}.*nothing is asked of a network"):
        asked(tmp_path, "json", data_files=[address])


def test_what_is_missing_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    command = f"hf download --repo-type dataset Rowan/hellaswag --local-dir {tmp_path}/Rowan/hellaswag"
    with pytest.raises(DataError, match=f"no folder Rowan/hellaswag.*{command}"):
        asked(tmp_path, "Rowan/hellaswag")
    with pytest.raises(DataError, match="no folder xnli"):
        asked(tmp_path, "xnli", "en")


def test_a_script_is_refused_and_the_converted_copy_taken(tmp_path: Path) -> None:
    folder = file(tmp_path / "haonan-li" / "cmmlu" / "cmmlu.py").parent
    with pytest.raises(DataError, match=r"cmmlu\.py is a script.*--revision refs/convert/parquet haonan-li/cmmlu"):
        asked(tmp_path, "haonan-li/cmmlu", "agronomy")
    files = {split: [str(file(folder / "agronomy" / split / "0000.parquet"))] for split in ("dev", "test")}
    assert asked(tmp_path, "haonan-li/cmmlu", "agronomy") == ("parquet", {"data_files": files})
    file(folder / "README.md")
    (folder / "cmmlu.py").unlink()
    assert asked(tmp_path, "haonan-li/cmmlu", "agronomy") == (str(folder), {"name": "agronomy"})
