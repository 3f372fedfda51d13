"""VLMEvalKit's run.py with our model, in the process and behind a server: the verdicts of `parrot eval`, row by row."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parrot_sys.evaluation.extraction import extract_option
from tests.integrations.kit_tables import MODEL, NEW_TOKENS, OPTIONS, table
from tests.support.serving import serving

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/open-compass/VLMEvalKit"
COMMIT = "e8e78f05f3080fe28154f2130321f17951c3be94"
LANGUAGES = ("en", "tr", "cn")
pytest.importorskip("timeout_decorator", reason="runs in an environment of its own: make test-integrations")


@pytest.fixture(scope="module")
def kit() -> Path:
    """A checkout of the kit, which is no package; cloned once (VLMEVALKIT_REPOSITORY: from there)."""
    folder = ROOT / "build" / "integrations" / "VLMEvalKit"
    if not (folder / "run.py").is_file():
        source = os.environ.get("VLMEVALKIT_REPOSITORY", REPOSITORY)
        subprocess.run(["git", "clone", "-q", "--no-checkout", source, str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "-q", COMMIT], check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tables, and what `parrot eval` says of them in `ours`."""
    folder = tmp_path_factory.mktemp("kit")
    for language in LANGUAGES:
        table(folder / "tables" / f"MMMB_mini_{language}.tsv")
    run(
        folder,
        *["parrot_sys", "eval", "--checkpoint", str(MODEL), "--output", "ours", "--data", "tables"],
        *["--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"],
    )
    return folder


def run(folder: Path, *command: str) -> None:
    variables = {**os.environ, "LMUData": str(folder / "tables"), "PRED_FORMAT": "tsv", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def asked_by(kit: Path, folder: Path, output: str, *model: str) -> dict[str, dict[int, tuple[str, bool]]]:
    """Language -> index -> answer and verdict of the kit."""
    names = [f"MMMB_mini_{language}" for language in LANGUAGES]
    options = ["--max-new-tokens", str(NEW_TOKENS), "--judge", "exact_matching", "--work-dir", output]
    program = ["tests.integrations.vlmevalkit_program", "--kit", str(kit), *model, "--data", *names, *options]
    run(folder, *program)
    found = {}
    for language, name in zip(LANGUAGES, names, strict=True):
        file = next((folder / output).rglob(f"*{name}*_result.tsv"))
        with open(file, encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened, delimiter="\t"))
        found[language] = {int(row["index"]): (row["prediction"], float(row["hit"]) == 1) for row in rows}
    return found


def ours(folder: Path, language: str) -> dict[int, tuple[str, bool]]:
    """Index -> answer and verdict of `parrot eval`."""
    lines = next((folder / "ours").rglob(f"*_MMMB_mini_{language}.jsonl")).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "index" in record]
    right = {index: "AB"[index % 2] for index in range(len(records))}
    return {
        record["index"]: (
            record["prediction"],
            extract_option(record["prediction"], OPTIONS) == right[record["index"]],
        )
        for record in records
    }


def test_answers_and_verdicts_are_those_of_parrot_eval(kit: Path, folder: Path) -> None:
    wanted = {language: ours(folder, language) for language in LANGUAGES}
    assert {verdict for rows in wanted.values() for _, verdict in rows.values()} == {True, False}
    assert asked_by(kit, folder, "theirs", "--checkpoint", str(MODEL), "--device", "cpu") == wanted
    with serving(folder, checkpoint=MODEL) as server:
        assert asked_by(kit, folder, "served", "--server", server.url) == wanted


def test_a_model_and_a_checkout_must_be_named(kit: Path, folder: Path) -> None:
    module = [sys.executable, "-m", "parrot_sys.integrations.vlmevalkit"]
    for options, named in (([], "--kit"), (["--kit", str(kit)], "--checkpoint")):
        result = subprocess.run([*module, *options], cwd=folder, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert named in result.stderr
