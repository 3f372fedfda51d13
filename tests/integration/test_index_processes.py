"""Building an index in several processes, and after the one that builds was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from parrot_sys.data.index import build
from parrot_sys.data.processor import ParrotProcessor
from tests.data.index_files import facts, index_of, make_records, write

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parrot_tiny"


@pytest.fixture(scope="module")
def processor():
    return ParrotProcessor.from_pretrained(FIXTURES / "model")


@pytest.fixture
def pictures(tmp_path):
    return [shutil.copy(FIXTURES / f"image_{i}.png", tmp_path / f"{i}.png").name for i in range(3)]


def test_several_processes_build_what_one_does(tmp_path, processor, pictures):
    path = write(tmp_path / "set.json", make_records(60, 1, [*pictures, "missing.png"], wrong=True))
    with patch.object(build, "_BLOCK", 7):
        alone = facts(index_of(processor, path, tmp_path / "one"))
        with patch.object(build, "_SMALL", 1), patch("parrot_sys.platform.cores", lambda: 2):
            together = facts(index_of(processor, path, tmp_path / "many"))
    assert together == alone
    assert len(alone["problems"]) > 0


PROGRAM = """
import sys
from pathlib import Path
from parrot_sys.data.index import build
from parrot_sys.data.processor import ParrotProcessor
from tests.data.index_files import index_of
build._BLOCK, build._SMALL = 5, 1
processor = ParrotProcessor.from_pretrained(Path(sys.argv[1]))
print("start", flush=True)
index_of(processor, sys.argv[2], Path(sys.argv[3]), workers=2)
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_and_leaves_no_process(tmp_path, processor, pictures):
    path = write(tmp_path / "set.json", make_records(400, 3, pictures))
    wanted = facts(index_of(processor, path, tmp_path / "whole"))
    command = [sys.executable, "-c", PROGRAM, str(FIXTURES / "model"), path, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        end = time.monotonic() + 120
        while len(parts := list((tmp_path / "killed").glob(".set*.parts/*.npz"))) < 5 and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
        group = process.pid
    assert 5 <= len(parts) < 80
    for _ in range(200):  # the workers end by themselves
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(group, signal.SIGKILL)
        pytest.fail("workers outlive the process that started them")
    kept = {part: part.stat().st_mtime_ns for part in (tmp_path / "killed").glob(".set*.parts/*.npz")}
    with patch.object(build, "_BLOCK", 5), patch.object(build.shutil, "rmtree"):
        assert facts(index_of(processor, path, tmp_path / "killed")) == wanted
    assert kept == {part: part.stat().st_mtime_ns for part in kept}  # none was made twice
