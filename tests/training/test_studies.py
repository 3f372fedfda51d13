"""Studies from data to report, with a few steps a stage, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "only", "variants"),
    [
        ("languages", ["--only", "24 languages"], 2),
        ("languages", ["--only", "wide", "--only", "imbalanced"], 1),
        ("languages", ["--only", "bias"], 1),
        ("wings_curve", ["--only", "5e-4"], 6),
        ("joint", [], 4),
        ("answers", ["--only", "long"], 2),
    ],
)
def test_a_study_runs_from_end_to_end(study: str, only: list[str], variants: int, tmp_path: Path) -> None:
    """And a second start does nothing again."""
    command = [sys.executable, str(ROOT / "train" / "experiment.py"), "--study", study, "--quick", "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    texts = []
    for more in ([], ["--report"]):
        result = subprocess.run(
            [*command, *only, *more], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        report = tmp_path / "runs" / "evidence-quick" / "report" / study
        (path,) = report.glob("*.json")
        content = json.loads(path.read_text())
        assert len(content["results"]) == variants
        assert all(list(seeds) == ["0"] for seeds in content["results"].values())
        texts.append((report / "report.md").read_text())
    assert texts[0] == texts[1]
    assert "$ " not in result.stdout, "a report runs no command"
