"""Training from archives: the losses are those from files, on several ranks and with cached features; forks."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.image_sources.archive import Member
from parrot_sys.data.image_sources.root import ImageRoot
from parrot_sys.data.image_sources.tar import TarArchive
from parrot_sys.training.config import TrainConfig
from tests.data.picture_archives import write_files, write_parquet, write_tar
from tests.training.tiny import FIXTURE, losses, run, tiny_config

PICTURES = {path.name: path.read_bytes() for path in FIXTURE.glob("image_*.png")} | {"image_1.png": b"no picture"}


def _config(folder: Path, name: str, root: Path, *, cached: bool) -> TrainConfig:
    config = tiny_config(folder, max_steps=4, output=name, cache_image_features=cached)
    data = dataclasses.replace(config.data, image_roots=(str(root),), on_bad_sample="skip")
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("cached", [False, True])
def test_losses_are_those_from_files(tmp_path: Path, cached: bool) -> None:
    names = sorted(PICTURES)
    for i in range(2):
        part = {name: PICTURES[name] for name in names[i::2]}
        write_tar(tmp_path / f"tars/{i}.tar", part)
        write_parquet(tmp_path / f"parquet/{i}.parquet", part, struct=True)
    plain = _config(tmp_path, "plain", write_files(tmp_path / "files", PICTURES), cached=False)
    run(plain, 2)
    for kind in ("tars", "parquet"):
        config = _config(tmp_path, kind, tmp_path / kind, cached=cached)
        run(config, 2)
        assert losses(config) == losses(plain)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_forked_processes_share_no_position(tmp_path: Path, kind: str) -> None:
    pictures = {str(i): bytes([i]) * (50_000 + i) for i in range(20)}
    root = ImageRoot((write_tar if kind == "tar" else write_parquet)(tmp_path / f"a.{kind}", pictures))
    before = root.picture("7").open()  # open in the parent, too, with a position of its own
    assert before.read(10) == b"\7" * 10
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(root, pictures, start)) for start in range(3)]
    for worker in workers:
        worker.start()
    assert before.read() == pictures["7"][10:]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def test_one_of_several_processes_builds_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, built = write_tar(tmp_path / "a.tar", {"0": b"x"}), tmp_path / "built"
    members = TarArchive.members

    def slow(archive: TarArchive, advance: Any) -> Iterator[Member]:
        with built.open("a") as file:
            file.write("once ")
        time.sleep(0.5)
        yield from members(archive, advance)

    monkeypatch.setattr(TarArchive, "members", slow)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(path, {"0": b"x"}, 0)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert built.read_text() == "once "


def _read_all(root: ImageRoot | Path, pictures: dict[str, bytes], start: int) -> None:
    root = ImageRoot(root) if isinstance(root, Path) else root
    for turn in range(60):
        name = str((start + turn * 7) % len(pictures))
        with root.picture(name).open() as file:
            assert b"".join(iter(lambda: file.read(999), b"")) == pictures[name]
