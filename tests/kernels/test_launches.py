"""Launches that go past Triton launch what Triton would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("launch_calls.py")


@pytest.fixture(scope="module")
def printed() -> list[Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_same_code_and_arguments_as_by_triton(printed: list[Any]) -> None:
    """Whatever changes between two calls: sizes, dtypes, addresses, constants, tiles; and a profiler hears of each."""
    rows = {row["name"]: row for row in printed[:-1]}
    assert len(rows) == 13
    for name, row in rows.items():
        assert row["seen"] == [row["wanted"]] * 4, name
        assert row["hooks"] == 1, name
    # Another number of rows is the same code, which the call before it made ready; an odd address is left to Triton.
    kept = {name: row["kept"] for name, row in rows.items()}
    assert kept == dict.fromkeys(rows, 1) | {"other rows": 0, "other address": 0}
    codes = [row["wanted"][1] for row in rows.values()]
    assert len(set(codes)) == len(rows) - 2  # other rows, and 1.0 for 0.5, are the same code


def test_scratch_is_kept_by_stream(printed: list[Any]) -> None:
    """As large as Triton's own, which the first launch asks for; the stream's from then on, but for a large grid."""
    by_triton, second, third, other_stream, *large, last = printed[-1]
    size, addresses = by_triton[0], [address for _, address in (second, third, last)]
    assert size >= 4 * 2 * 128  # programs, descriptors and their bytes
    assert second[0] >= size
    assert len(set(addresses)) == 1
    assert other_stream[0] >= size
    assert other_stream[1] != addresses[0]
    for own in large:
        assert own[0] == 2000 * size > second[0]
        assert own[1] != addresses[0]
