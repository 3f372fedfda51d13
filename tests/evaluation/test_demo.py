"""The whole demo with little data and few steps: data, three stages under torchrun, evaluation, report, talk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parrot_sys.data.constants import LANGUAGES

SCRIPT = Path(__file__).parents[2] / "train" / "demo.py"


def run(folder: Path) -> str:
    command = [sys.executable, str(SCRIPT), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_quick_demo_and_its_second_start(tmp_path: Path) -> None:
    output = run(tmp_path)
    root = tmp_path / "runs" / "demo-quick"
    report = json.loads((root / "report" / "report.json").read_text(encoding="utf-8"))
    for part in ("style", "concept"):
        assert list(report[part]) == list(LANGUAGES)
        assert all(0 <= value <= 100 for value in report[part].values())
    details = report["details"]
    assert set(details["routing"]) == {"off", "other-language"}
    assert all(change > 0 for row in details["logit_change"]["style"].values() for change in row.values())
    assert set(details["training"]) == {"0 text", "1 alignment", "2 instruction"}
    assert (root / "report" / "loss.png").is_file()
    for language in LANGUAGES:
        assert f"--- {language}: the right name is" in output
    stamps = {path.name: path.read_text() for path in (root / "stamps").iterdir()}
    again = run(tmp_path)
    assert again.count("done before") == len(stamps) == 10
    assert {path.name: path.read_text() for path in (root / "stamps").iterdir()} == stamps
