"""Checkpoints of Megatron's TEGroupedMLP, whose weights are `weight{i}` in memory, load into our experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_our_experts_load_what_te_grouped_mlp_saved(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.megatron.te_grouped_program", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["loaded False", "loaded True"]
