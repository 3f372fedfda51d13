"""VLMEvalKit's run.py with our model, in the process and behind a server: the verdicts of `parrot eval`, row by row."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.errors import ConfigError
from parrot_sys.evaluation.extraction import extract_option
from parrot_sys.evaluation.prompts import question_prompt
from parrot_sys.evaluation.tsv import picture_bytes, read_table
from tests.evaluation.tables import picture, write_table
from tests.integrations.kit_tables import MODEL, NEW_TOKENS, OPTIONS, table
from tests.integrations.openai_stub import completion, refusal, stub
from tests.integrations.vlmevalkit_program import prepare
from tests.support.serving import serving

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/open-compass/VLMEvalKit"
COMMIT = "e8e78f05f3080fe28154f2130321f17951c3be94"
LANGUAGES = ("en", "tr", "cn", "pt", "ar", "ru")
JOINED = {"MMMB": "MMMB", "MTL_MMBench_DEV": "MMBench_dev"}
"""Data sets of the kit that join tables -> what the names of the tables begin with."""
TABLES = ["MMMB_mini_tr", *(f"{base}_{language}" for base in JOINED.values() for language in LANGUAGES)]
LONG = "long_mini_en"
NO_ANSWER = "Failed to obtain answer via API."
KEY = "a-key"
pytest.importorskip("timeout_decorator", reason="runs in an environment of its own: make test-integrations")

Rows = dict[int, tuple[str, bool]]
"""Index -> answer and verdict."""


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
    for name in TABLES:
        table(folder / "tables" / f"{name}.tsv")
    evaluate(folder, "ours", "tables", "--max-new-tokens", str(NEW_TOKENS))
    return folder


@pytest.fixture(scope="module")
def models(kit: Path) -> Any:
    """The module of our models, with the kit in this process."""
    prepare(str(kit))
    from parrot_sys.integrations.vlmevalkit import vlmevalkit_models

    return vlmevalkit_models


def evaluate(folder: Path, output: str, data: str, *options: str) -> None:
    """Runs `parrot eval`."""
    command = ["parrot_sys", "eval", "--checkpoint", str(MODEL), "--output", output, "--data", data]
    run(folder, *command, "--device", "cpu", *options)


def run(folder: Path, *command: str, **variables: str) -> str:
    """Output of a module that runs to its end."""
    variables = {**os.environ, "PRED_FORMAT": "tsv", "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout + result.stderr


def asked_by(kit: Path, folder: Path, output: str, data: list[str], *model: str, tables: str = "tables") -> str:
    """What run.py prints. No variable of the kit's own leads to another server, or to another key than ours."""
    program = ["tests.integrations.vlmevalkit_program", "--kit", str(kit), *model, "--data", *data]
    variables = {"LMUData": str(folder / tables), "PARROT_API_KEY": KEY, "LMDEPLOY_API_KEY": "another"}
    variables |= {"LMDEPLOY_API_BASE": "http://127.0.0.1:9/v1/chat/completions"}
    return run(folder, *program, "--judge", "exact_matching", "--work-dir", output, **variables)


def rows_of(folder: Path, pattern: str) -> list[dict[str, str]]:
    """Rows of a table that the kit wrote."""
    with open(next(folder.rglob(pattern)), encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter="\t"))


def theirs(folder: Path, name: str) -> Rows:
    """What the kit says of a table."""
    rows = rows_of(folder, f"*_{name}_*_result.tsv")
    return {int(row["index"]): (row["prediction"], float(row["hit"]) == 1) for row in rows}


def predictions(folder: Path, name: str) -> dict[int, str]:
    """Index -> answer by `parrot eval`."""
    lines = next(folder.rglob(f"*_{name}.jsonl")).read_text(encoding="utf-8").splitlines()
    return {record["index"]: record["prediction"] for record in map(json.loads, lines) if "index" in record}


def ours(folder: Path, name: str) -> Rows:
    """What `parrot eval` says of a table."""
    return {
        index: (answer, extract_option(answer, OPTIONS) == "AB"[index % 2])
        for index, answer in predictions(folder / "ours", name).items()
    }


def test_answers_and_verdicts_are_those_of_parrot_eval(kit: Path, folder: Path) -> None:
    wanted = {name: ours(folder, name) for name in TABLES}
    assert {verdict for rows in wanted.values() for _, verdict in rows.values()} == {True, False}
    data = ["MMMB_mini_tr", *JOINED]
    short = ["--max-new-tokens", str(NEW_TOKENS)]
    asked_by(kit, folder, "theirs", data, "--checkpoint", str(MODEL), "--device", "cpu", *short)
    assert {name: theirs(folder / "theirs", name) for name in TABLES} == wanted
    with serving(folder, checkpoint=MODEL, environment=[("PARROT_API_KEY", KEY)]) as server:
        asked_by(kit, folder, "served", data, "--server", server.url, *short)
    assert {name: theirs(folder / "served", name) for name in TABLES} == wanted


def test_without_a_length_an_answer_takes_the_room_there_is(kit: Path, folder: Path) -> None:
    """The default is longer than what the prompts leave of the model's 512 rows; one of them leaves nothing."""
    row = {**OPTIONS, "answer": "A", "category": "one", "image": picture()}
    questions = ["What is this?", "Why? " * 40, "Why? " * 2000]
    write_table(folder / "long" / f"{LONG}.tsv", [{**row, "index": i, "question": q} for i, q in enumerate(questions)])
    evaluate(folder, "ours_long", "long", "--on-bad-question", "wrong")
    wanted = {**predictions(folder / "ours_long", LONG), 2: NO_ANSWER}
    assert len(wanted) == 3
    asks = {"theirs_long": ["--checkpoint", str(MODEL), "--device", "cpu"], "served_long": ["--server"]}
    with serving(folder, checkpoint=MODEL, environment=[("PARROT_API_KEY", KEY)]) as server:
        asks["served_long"].append(server.url)
        for output, model in asks.items():
            printed = asked_by(kit, folder, output, [LONG], *model, "--mode", "infer", tables="long")
            assert "a question cannot be asked and counts as failed: " in printed
            rows = rows_of(folder / output / "parrot", f"*_{LONG}.tsv")
            assert {int(row["index"]): row["prediction"] for row in rows} == wanted


def test_names_of_the_kit_end_in_languages_only_where_they_are_some(models: Any) -> None:
    """All names that it knows; in the table's own words, `MI` is multi-image and `KO` is Korean."""
    found: dict[str, set[str]] = {}
    for name in models.SUPPORTED_DATASETS:
        found.setdefault(models.table_language(name), set()).add(re.split("[_-]", name)[-1].lower())
    found.pop("en")
    assert {code: ends for code, ends in found.items() if ends != {code}} == {"zh": {"cn", "zh"}}
    assert set(found) == {"ar", "es", "fr", "ja", "ko", "pt", "ru", "tr", "zh"}
    assert [models.table_language(f"MMMB_{own}") for own in ("pt", "de", "mini_sw")] == ["pt", "de", "sw"]


def test_questions_with_options_about_videos_keep_the_prompts_of_the_kit(models: Any) -> None:
    asked = [
        models.Prompts().use_custom_prompt(name) for name in ("MMMB", "MMStar", "Video-MME", "MVBench", "MME", None)
    ]
    assert asked == [True, True, False, False, False, False]


def test_a_server_that_fails_answers_nothing_or_says_no(models: Any) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        word = body["messages"][0]["content"][0]["text"]
        if word == "too long":
            return refusal(400, "too long") if "max_tokens" in body else completion("The answer is B.")
        return {"empty": completion(""), "bad": refusal(400, "bad"), "broken": (500, "oops")}[word]

    with stub(answer) as server:
        model = models.ParrotServer(server.url, max_new_tokens=9, key="k", retry=2)
        model.wait = 0
        found = {}
        for word, asks in (("too long", 2), ("empty", 1), ("bad", 2), ("broken", 2)):
            server.bodies.clear()
            found[word] = model.generate([{"type": "text", "value": word}], dataset="MMMB")
            assert len(server.bodies) == asks, word
    assert found == {"too long": "The answer is B.", "empty": "", "bad": NO_ANSWER, "broken": NO_ANSWER}
    assert set(server.keys) == {"Bearer k"}


def test_what_run_py_is_to_do_it_is_told(kit: Path) -> None:
    """None of its options is taken for one of ours, but for those that mean the same."""
    from parrot_sys.integrations.vlmevalkit.__main__ import parser

    known = set(re.findall(r"add_argument\(\s*'(--[a-z-]+)'", (kit / "run.py").read_text(encoding="utf-8")))
    assert {"--mode", "--data", "--work-dir"} < known
    for option in known - {"--model", "--key"}:
        assert parser().parse_known_args(["--kit", "k", option, "x"])[1] == [option, "x"]


def test_a_question_of_joined_tables_is_asked_as_its_own_table_has_it(
    models: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMUData", str(folder / "tables"))
    data, prompts = models.build_dataset("MMMB"), models.Prompts()
    prompts.dump_image_func = data.dump_image
    asked = [prompts.build_prompt(data[place], "MMMB") for place in range(len(data))]
    tables = [read_table(folder / "tables" / f"MMMB_{language}.tsv") for language in sorted(LANGUAGES)]
    rows = [(table, question) for table in tables for question in table.questions]
    assert [text["value"] for _, text in asked] == [
        question_prompt(question, table.language).removeprefix(f"{IMAGE_TOKEN}\n") for table, question in rows
    ]
    assert [Path(image["value"]).read_bytes() for image, _ in asked] == [
        picture_bytes(table.images[str(question.index)]) for table, question in rows
    ]


def test_what_cannot_run_ends_in_one_line(
    kit: Path, models: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from parrot_sys.integrations.vlmevalkit.__main__ import PROG, _built, main

    asks = ["--kit", str(kit), "--server", "http://127.0.0.1:9", "--data", "MMMB_mini_tr"]
    with pytest.raises(ConfigError, match="--model must be no name that the kit has a model for, got GPT4o"):
        main([*asks, "--model", "GPT4o"])
    with pytest.raises(SystemExit):
        _built(models.ParrotVLM, "no_such_folder", max_new_tokens=1)
    assert re.fullmatch(rf"{PROG}: error: .*no_such_folder.*\n", capsys.readouterr().err)
    refused = [
        ("parrot_sys.integrations.vlmevalkit", [], "--kit"),
        ("parrot_sys.integrations.vlmevalkit", asks[:2], "--checkpoint"),
        ("tests.integrations.vlmevalkit_program", asks, "got no answer ([Errno 111] Connection refused)"),
    ]
    variables = {**os.environ, "LMUData": str(folder / "tables"), "OMP_NUM_THREADS": "1"}
    for module, options, named in refused:
        command = [sys.executable, "-m", module, *options]
        result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        last = result.stderr.splitlines()[-1]
        assert result.returncode == 2, result.stderr
        assert "error: " in last, result.stderr
        assert named in last, last
