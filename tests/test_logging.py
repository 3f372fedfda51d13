"""Which rank logs what."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from parrot_sys import platform
from parrot_sys.logging import setup_logging


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    logger = logging.getLogger("parrot_sys")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def logged(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, *, all_ranks: bool = False) -> list[str]:
    launch = platform.Launch(rank=rank, world_size=world_size)
    monkeypatch.setattr(platform, "launch", lambda: launch)
    stream = io.StringIO()
    setup_logging(stream=stream, all_ranks=all_ranks)
    logger = logging.getLogger("parrot_sys.some.module")
    logger.debug("d")
    logger.info("i %d", 1)
    logger.warning("w")
    return [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, 0, 1) == ["INFO parrot_sys.some.module: i 1", "WARNING parrot_sys.some.module: w"]


def test_rank_0_of_two_looks_like_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, 0, 2) == logged(monkeypatch, 0, 1)


def test_other_ranks_only_warn_and_say_who_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, 1, 2) == ["[rank 1] WARNING parrot_sys.some.module: w"]


def test_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = logged(monkeypatch, 1, 2, all_ranks=True)
    assert lines == ["[rank 1] INFO parrot_sys.some.module: i 1", "[rank 1] WARNING parrot_sys.some.module: w"]


def test_setting_up_twice_logs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging(stream=io.StringIO())
    assert len(logged(monkeypatch, 0, 1)) == 2
    assert len(logging.getLogger("parrot_sys").handlers) == 1


def test_control_characters_are_escaped() -> None:
    stream = io.StringIO()
    setup_logging(stream=stream)
    logging.getLogger("parrot_sys.test").warning("name %s\n\tsecond line", "a\x1b[2J\r\u202eb")
    assert stream.getvalue().endswith("name a\\x1b[2J\\x0d\\u202eb\n\tsecond line\n")
