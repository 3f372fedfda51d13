"""Image names from records: what leaves the image root, or is no regular file, is refused with its reason."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.image_sources.folder import ImageFolder

PARTS = [
    *("in.png", "folder", "secret.png", "..", ".", "", "root", "pipe", "nowhere", "\0", "\ud800", "x" * 300),
    *("link_in.png", "link_out.png", "link_pipe", "link_broken", "folder_in", "folder_out", "loop"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A root with a file, a folder, a pipe and links to all of them, and a file and a folder outside."""
    base = tmp_path_factory.mktemp("images")
    root = base / "root"
    (root / "folder").mkdir(parents=True)
    for path in (root / "in.png", root / "folder" / "in.png", base / "secret.png"):
        path.write_bytes(b"x")
    os.mkfifo(root / "pipe")
    links = {"link_in.png": "in.png", "link_out.png": "../secret.png", "link_pipe": "pipe", "link_broken": "gone"}
    links |= {"folder_in": "folder", "folder_out": "..", "loop": "loop"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    return base


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), st.sampled_from(["", "/", "root/", "outside/"]))
def test_names_stay_inside_or_are_refused(base, parts, start):
    root = base / "root"
    prefix = {"root/": f"{root}/", "outside/": f"{base}/"}.get(start, start)
    name = prefix + "/".join(parts)
    path = os.path.join(root, name)
    try:
        real, regular = os.path.realpath(path), os.path.isfile(path)
    except ValueError:  # a NUL or half a surrogate pair
        real, regular = "", False
    inside = real.startswith(f"{root}/")
    problem = ImageFolder(root).problem(name)
    assert (problem is None) == (inside and regular), problem
    anywhere = ImageFolder(root, allow_outside=True).problem(name)
    assert (anywhere is None) == regular, anywhere
    if problem is not None:
        assert "\0" not in problem
        assert problem.isprintable()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "leads out of the image root .*: name the folder in data.image_roots, or set data.allow_out"),
        ("link_out.png", "leads out of the image root"),
        ("folder_out/secret.png", "leads out of the image root"),
        ("/dev/null", "is a device; wanted a regular file"),
        ("pipe", "is a named pipe; wanted a regular file"),
        ("link_pipe", "is a named pipe; wanted a regular file"),
        ("folder", "is a folder; wanted a regular file"),
        ("nowhere.png", "is missing"),
        ("link_broken", "is missing"),
        ("in.png/more.png", "is missing"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", r"a\\x00b cannot be read: no file can have this name"),
        ("data:image/png;base64," + "A" * 10_000, r"A\.\.\. cannot be read: File name too long"),
        ("\x1b[2J\n", r"\\x1b\[2J\\x0a is missing"),
    ],
)
def test_reasons(base, name, reason):
    problem = ImageFolder(base / "root").problem(name)
    assert problem is not None
    assert re.search(reason, problem), problem


def test_each_folder_is_listed_once_and_no_file_is_asked_for(base, monkeypatch):
    listed, asked = [], []
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    folder = ImageFolder(base / "root")
    monkeypatch.setattr(os, "stat", lambda path, **options: (asked.append(path), stat(path, **options))[1])
    assert [folder.problem(name) for name in ("in.png", "folder/in.png") * 50] == [None] * 100
    assert len(listed) == 2
    assert asked == []
