"""The results file: whole after every row, and of one machine and one state of the sources only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_suite.store import IDENTITY, OtherRun, Store, load

MACHINE = {"device": "some GPU", "driver": "1", "torch": "2", "triton": "3", "sources": "abc", "time": "now"}


def test_rows_survive_from_one_run_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    first = Store(path, MACHINE)
    first.record("bench", "one", {"status": "passed", "ms": 1.5})
    assert load(path)["stages"]["bench"]["rows"] == {"one": {"status": "passed", "ms": 1.5}}
    first.end_run("bench", {"seconds": 1.0}, {"two": "no time"})
    second = Store(path, {**MACHINE, "time": "later"})
    assert second.rows("bench") == {
        "one": {"status": "passed", "ms": 1.5},
        "two": {"status": "not_run", "error": "no time"},
    }
    assert second.content["machine"]["time"] == "now"
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("key", IDENTITY)
def test_results_of_something_else_are_not_mixed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "r.json"
    Store(path, MACHINE).record("bench", "one", {"status": "passed"})
    with pytest.raises(OtherRun, match=f"{key} {MACHINE[key]} -> another"):
        Store(path, {**MACHINE, key: "another"})
    assert Store(path, {**MACHINE, key: "another"}, fresh=True).rows("bench") == {}


def test_a_file_that_is_cut_off_while_it_is_written_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    store = Store(path, MACHINE)
    store.record("bench", "one", {"status": "passed"})

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.record("bench", "two", {"status": "passed"})
    assert list(load(path)["stages"]["bench"]["rows"]) == ["one"]


@pytest.mark.parametrize("content", [[], {"schema": 0, "stages": {}}, {"schema": 1}])
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no results file"):
        load(path)
