"""Folders that replace others: whenever a process dies, what was there is there, or what is new, and the rest goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_sys import staging
from parrot_sys.staging import remove_leftovers, scratch_directory, staged_directory


def _in_child(action: Callable[[], Any]) -> int:
    """How a child process that does `action` ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write(path: Path, content: str) -> None:
    with staged_directory(path) as folder:
        (folder / "part").write_text(content)
        (folder / "other").write_text(content)


def _read(path: Path) -> str | None:
    """What a folder holds, all of its files alike; None when there is none."""
    if not path.exists():
        return None
    contents = {(path / name).read_text() for name in ("part", "other")}
    assert len(contents) == 1, "half of one and half of another"
    return contents.pop()


_CALLS = ("mkdir", "open", "rename", "rmdir", "unlink")


def _die_at_call(number: int, *, exchange: bool) -> None:
    """Kills this process at one of the calls that change the disk."""
    left = [number]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, dying(getattr(os, name)))
    Path.write_text = dying(Path.write_text)  # type: ignore[method-assign]
    staging._exchanged = dying(staging._exchanged) if exchange else lambda one, other: False


@given(
    before=st.booleans(),
    deaths=st.lists(st.integers(0, 25), min_size=1, max_size=4),
    exchange=st.booleans(),
    name=st.sampled_from(["out", "a[b]*", "with space", ".hidden"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_old_or_the_new_is_there_whenever_processes_die(
    tmp_path_factory: pytest.TempPathFactory, before: bool, deaths: list[int], exchange: bool, name: str
) -> None:
    folder = tmp_path_factory.mktemp("staged")
    path = folder / name
    if before:
        _write(path, "before")
    good = {"before"} if before else {None}
    for number, death in enumerate(deaths):
        content = f"after {number}"

        def replace(content: str = content, death: int = death) -> None:
            _die_at_call(death, exchange=exchange)
            _write(path, content)

        code = _in_child(replace)
        assert code in (0, -signal.SIGKILL)
        remove_leftovers(path)  # what every start does first
        held = _read(path)
        assert held in good | {content}
        assert code or held == content
        good = {held}
        assert sorted(each.name for each in folder.iterdir()) in ([name], []), "nothing is left over"


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    _write(tmp_path / "out", "before")

    def interrupted() -> None:
        with staged_directory(tmp_path / "out") as folder:
            (folder / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _read(tmp_path / "out") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_of_a_living_process_stays(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "out") as folder:
        assert _in_child(lambda: remove_leftovers(tmp_path / "out")) == 0
        remove_leftovers(tmp_path / "out")
        assert folder.is_dir()
        _write(tmp_path / "out", "beside it")
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in (".other.x.tmp", "out.tmp", ".outer.x.tmp", ".out"):
        (tmp_path / name).mkdir()
    _write(tmp_path / "out", "new")
    assert {path.name for path in tmp_path.iterdir()} == {".other.x.tmp", "out.tmp", ".outer.x.tmp", ".out", "out"}


def test_the_umask_decides_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _write(tmp_path / "out", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
