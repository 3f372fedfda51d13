"""The whole demo with little data and few steps: data, three stages under torchrun, evaluation, report, talk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parrot_sys.data.languages import MMMB_LANGUAGES

SCRIPT = Path(__file__).parents[2] / "train" / "demo.py"


def run(folder: Path, model: str = "parrot") -> str:
    command = [sys.executable, str(SCRIPT), "--quick", "--model", model]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, cwd=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_quick_demo_and_its_second_start(tmp_path: Path) -> None:
    output = run(tmp_path)
    root = tmp_path / "runs" / "demo-quick"
    report = json.loads((root / "report" / "report.json").read_text(encoding="utf-8"))
    for part in ("style", "concept"):
        assert list(report[part]) == list(MMMB_LANGUAGES)
        assert all(0 <= value <= 100 for value in report[part].values())
    details = report["details"]
    assert set(details["routing"]) == {"off", "other-language"}
    assert all(change > 0 for row in details["logit_change"]["style"].values() for change in row.values())
    assert details["routes"]["style"]["language"]["n"] == sum(cell["n"] for cell in details["cells"]["style"].values())
    assert set(details["training"]) == {"0 text", "1 alignment", "2 instruction"}
    assert (root / "report" / "loss.png").is_file()
    for language in MMMB_LANGUAGES:
        assert f"--- {language}: the right name is" in output
    same_picture = output.split("--- the same picture, en.png, in every language")[1]
    assert same_picture.count("most weight: expert") == len(MMMB_LANGUAGES)
    stamps = {path.name: path.read_text() for path in (root / "stamps").iterdir()}
    again = run(tmp_path)
    assert again.count("done before") == len(stamps) == 10
    assert {path.name: path.read_text() for path in (root / "stamps").iterdir()} == stamps


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wings", "multimodal_gpt", "llava"])
def test_quick_demo_of_the_other_systems(tmp_path: Path, model: str) -> None:
    output = run(tmp_path, model)
    root = tmp_path / "runs" / f"demo-{model}-quick"
    report = json.loads((root / "report" / "report.json").read_text(encoding="utf-8"))
    assert list(report["style"]) == list(MMMB_LANGUAGES)
    forgetting = json.loads((root / "report" / "forgetting.json").read_text(encoding="utf-8"))
    assert set(forgetting) == {"before", "after", "change", "paired"}
    assert list(forgetting["change"]) == ["T", "TT", "TTT", "TTV", "TV", "V"]
    text = (root / "report" / "report.md").read_text(encoding="utf-8")
    for part in ("## Six types of dialogue", "## Attention on text before and after the image", "### TTV"):
        assert part in text
    assert (root / "report" / "attention.png").is_file()
    assert "--- en: the right name is" in output
