"""Launches that go past Triton launch what Triton would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("launch_calls.py")


def test_same_code_and_arguments_as_by_triton() -> None:
    """Whatever changes between two calls: sizes, dtypes, addresses, constants, tiles; and a profiler hears of each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 13
    for name, row in rows.items():
        assert row["seen"] == [row["wanted"]] * 4, name
        assert row["hooks"] == 1, name
    # Another number of rows is the same code, which the call before it made ready; an odd address is left to Triton.
    kept = {name: row["kept"] for name, row in rows.items()}
    assert kept == dict.fromkeys(rows, 1) | {"other rows": 0, "other address": 0}
    codes = [row["wanted"][1] for row in rows.values()]
    assert len(set(codes)) == len(rows) - 2  # other rows, and 1.0 for 0.5, are the same code
