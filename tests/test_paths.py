"""Settings that are paths: which there are, and whether a place can be written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import ConfigError
from parrot_sys.paths import (
    INPUT_FILE,
    NEW_FILE,
    NEW_FOLDER,
    OUTPUT_FILE,
    OUTPUT_FOLDER,
    Place,
    check_outputs,
    check_writable,
    path_settings,
)
from tests.permissions import mode

OUTPUTS = [OUTPUT_FOLDER, NEW_FOLDER, OUTPUT_FILE, NEW_FILE]


@dataclass(kw_only=True, frozen=True)
class _Part:
    plots: Annotated[tuple[str, ...], OUTPUT_FILE] = ()


@dataclass(kw_only=True, frozen=True)
class _Config:
    output: Annotated[Path | None, OUTPUT_FOLDER] = None
    data: Annotated[str, INPUT_FILE] = "missing"
    number: int = 3
    part: _Part = field(default_factory=_Part)
    absent: _Part | None = None


def test_settings_that_are_paths() -> None:
    assert path_settings(_Config) == {
        "output": OUTPUT_FOLDER,
        "data": INPUT_FILE,
        "part.plots": OUTPUT_FILE,
        "absent.plots": OUTPUT_FILE,
    }


def test_every_output_of_a_configuration_is_tried(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check_outputs(_Config())
    check_outputs(_Config(output=tmp_path / "new", part=_Part(plots=(str(tmp_path / "a.png"), str(file)))))
    with pytest.raises(ConfigError, match=f"^output must be a folder, got the file {file}"):
        check_outputs(_Config(output=file))
    with pytest.raises(ConfigError, match=rf"^part.plots must be a file, got the folder {tmp_path}"):
        check_outputs(_Config(part=_Part(plots=(str(file), str(tmp_path)))))
    assert sorted(tmp_path.iterdir()) == [file]


@given(
    place=st.sampled_from(OUTPUTS),
    deep=st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=4),
    exists=st.integers(0, 4),
    kind=st.sampled_from(["folder", "file", "dangling link"]),
    writable=st.booleans(),
)
def test_a_place_passes_if_and_only_if_it_can_be_written(
    place: Place,
    deep: list[str],
    exists: int,
    kind: str,
    writable: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Checked against writing: makes the folders and the file, or the folder with a file in it."""
    root = tmp_path_factory.mktemp("root")
    path = root.joinpath(*deep)
    there = [root, *(root.joinpath(*deep[:number]) for number in range(1, len(deep) + 1))][: exists + 1]
    for each in there[1:-1]:
        each.mkdir()
    if there[-1] != root:
        _make(there[-1], kind)
    locked = next((each for each in reversed(there) if each.is_dir()), root)
    before = sorted(root.rglob("*"))
    with mode(locked, 0o700 if writable else 0o500):
        try:
            check_writable(path, place)
            passes = True
        except ConfigError as error:
            passes = False
            text = str(error)
        assert sorted(root.rglob("*")) == before
        works = _write(path, place)
    assert passes == works
    assert passes or str(path) in text


def _make(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to("nowhere/at/all")


def _write(path: Path, place: Place) -> bool:
    """Does what a program does with its output."""
    if os.path.lexists(path) and path.is_dir() != place.folder:
        return False
    try:
        if place.beside:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "temporary").mkdir()
        elif place.folder:
            path.mkdir(parents=True, exist_ok=True)
            (path / "temporary").touch()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    except OSError:
        return False
    return True


def test_permissions_count_for_root_too(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for locked, path, place in ((tmp_path, tmp_path / "new", NEW_FILE), (file, file, OUTPUT_FILE)):
        check_writable(path, place)
        with mode(locked, 0o500 if locked.is_dir() else 0o400):
            with pytest.raises(PermissionError):
                path.write_text("")
            with pytest.raises(ConfigError, match=rf"^output {path} cannot be written: Permission denied"):
                check_writable(path, place)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for place in OUTPUTS:
        with pytest.raises(ConfigError, match=r"output .* cannot be written: File name too long"):
            check_writable(tmp_path / ("x" * 300), place)
        with pytest.raises(ConfigError, match="output /proc/none/here cannot be written"):
            check_writable(Path("/proc/none/here"), place)
