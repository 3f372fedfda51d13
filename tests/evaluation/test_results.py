"""What one output folder may hold, and what the report says about what was not checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation import main as command
from parrot_sys.evaluation import runner
from parrot_sys.evaluation.main import EvalConfig, evaluate
from parrot_sys.evaluation.report import ReportInput, build_report, load_scores
from parrot_sys.training.writer import read_metrics
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import write_table


@pytest.fixture
def data(three_languages: Path) -> Path:
    return three_languages


def model(**settings: str) -> Scripted:
    scripted = Scripted()
    scripted.settings = {**scripted.settings, **settings}
    return scripted


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"checkpoint": "def"}, {}, r"MMMB_en.*checkpoint: 'abc' -> 'def'"),
        ({"mode": "likelihood"}, {}, r"mode: 'generate' -> 'likelihood'"),
        ({}, {"rules": "2024"}, r"rules: 'current' -> '2024'"),
        ({}, {"name": "other"}, r"name: 'm' -> 'other'"),
    ],
)
def test_one_output_holds_one_model(
    data: Path, settings: Mapping[str, str], options: dict[str, Any], message: str
) -> None:
    output = data.parent / "out"
    evaluate(config(data, languages=("en",)), model())
    later = model(**settings)
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(config(data, languages=("zh",), **options), later)
    assert "--overwrite" in str(caught.value)
    assert "--output" in str(caught.value)
    assert later.asked == []
    assert list(load_scores(output)["style"]["model"]) == ["en"]
    evaluate(config(data, languages=("zh",), overwrite=True, **options), later)
    assert list(load_scores(output)["style"]["model"]) == ["zh"]
    assert not [path for path in output.rglob("*") if path.is_file() and "MMMB_cn" not in path.name]


def test_another_name_for_the_same_tables_is_refused(data: Path) -> None:
    evaluate(config(data, languages=("en",)), model())
    with pytest.raises(ConfigError, match="name: 'm' -> 'other'"):
        evaluate(config(data, languages=("en",), name="other"), model())


def test_second_table_is_checked_before_the_first_is_answered(data: Path) -> None:
    evaluate(config(data, languages=("zh",)), model())
    later = model(checkpoint="def")
    with pytest.raises(ConfigError, match="checkpoint"):
        evaluate(config(data, languages=("en", "zh")), later)
    assert later.asked == []


def test_languages_may_be_added_and_all_scored_by_other_rules(data: Path) -> None:
    evaluate(config(data, languages=("en",)), model())
    evaluate(config(data, languages=("zh",)), model())
    again = model()
    evaluate(config(data, languages=("en", "zh"), rules="2024"), again)
    assert again.asked == []
    scores = load_scores(data.parent / "out")["style"]["model"]
    assert {language: result["rules"] for language, result in scores.items()} == {"en": "2024", "zh": "2024"}


def test_mixed_files_make_no_report(data: Path, tmp_path: Path) -> None:
    evaluate(config(data, languages=("en", "zh")), model())
    path = tmp_path / "out" / "mmmb" / "model" / "m_MMMB_cn.scores.json"
    content = json.loads(path.read_text())
    content["settings"]["checkpoint"] = "def"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"m_MMMB_cn.*m_MMMB_en.*checkpoint: 'def' -> 'abc'"):
        load_scores(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(DataError, match=r"m_MMMB_cn\.scores\.json is damaged"):
        load_scores(tmp_path / "out")


def test_two_benchmarks_with_the_same_part_are_refused(data: Path) -> None:
    (data / "other_en.tsv").write_text((data / "mmmb_en.tsv").read_text())
    later = model()
    with pytest.raises(DataError, match="are both style in en"):
        evaluate(config(data, languages=("en",)), later)


def test_tables_with_other_rows_do_not_stop_the_default_run(data: Path) -> None:
    rows = [{"index": i, "question": "?", "A": "x", "B": "y", "answer": "A", "split": "style"} for i in (3, 77)]
    write_table(data / "mmmb_cn.tsv", rows)
    scripted = model()
    probed: dict[str, list[list[int]]] = {}
    measure = scripted.logit_change

    def logit_change(items: Any, routing: Any) -> float:
        if items[0].table.language == "en":
            probed.setdefault(routing, []).append([item.question.index for item in items])
        return measure(items, routing)

    scripted.logit_change = logit_change  # type: ignore[method-assign]
    evaluate(config(data), scripted)
    # each part on its own
    assert probed == {"off": [[1, 2, 1_000_001], [3, 4, 1_000_003]], "other-language": [[3]]}
    asked = model()
    with pytest.raises(DataError, match="needs the same rows"):
        evaluate(config(data, routing=("model", "other-language"), output=data.parent / "b"), asked)
    assert asked.asked == []  # not after hours of other tables


@pytest.mark.parametrize("shared", [False, True])
def test_report_says_what_was_not_checked(
    data: Path, tmp_path: Path, shared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if shared:
        row = {"index": 77, "question": "?", "A": "x", "B": "y", "answer": "A"}
        write_table(data / "mmmb_cn.tsv", [row])
        evaluate(config(data, languages=("en",)), model())
        why = "the other language's table holds none of its questions"
    else:
        evaluate(EvalConfig(checkpoint=tmp_path / "m", data=(data / "mmmb_en.tsv",), output=tmp_path / "out"), model())
        why = "--data holds mmmb in no second language"
    note = f"Whether another language's route changes the logits was not checked on MMMB_en: {why}."
    assert note in caplog.text
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "r", notes=["Mine."]))
    assert content["details"]["notes"] == ["Mine.", note]
    assert list(content["details"]["logit_change"]["style"]["en"]) == ["off"]
    assert f"> {note}" in (tmp_path / "r" / "report.md").read_text()


def test_report_says_what_the_model_has_to_say(data: Path, tmp_path: Path) -> None:
    scripted = model()
    scripted.has_experts, scripted.notes = False, ["Experts are not used."]
    evaluate(config(data), scripted)
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "r"))
    assert content["details"]["notes"] == ["Experts are not used."]


@pytest.mark.parametrize(
    ("routing", "caption"),
    [
        (("model",), "with the model's own routing*"),
        pytest.param(("model", "off"), "with the model's own routing and with routing off*", marks=pytest.mark.slow),
        (
            ("model", "off", "other-language"),
            "with the model's own routing and with routing off and other-language*",
        ),
    ],
)
def test_caption_names_what_is_drawn(data: Path, tmp_path: Path, routing: Any, caption: str) -> None:
    evaluate(config(data, routing=routing), model())
    build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "r"))
    assert caption in (tmp_path / "r" / "report.md").read_text()


def test_command_checks_each_table_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = runner.read_table
    monkeypatch.setattr(runner, "read_table", lambda path, **more: (read.append(path.name), real(path, **more))[1])
    monkeypatch.setattr(command, "load_predictor", lambda config: Scripted())
    monkeypatch.setattr(command, "setup_logging", lambda: None)
    assert command.main(["--checkpoint", "m", "--data", str(data), "--output", str(tmp_path / "out")]) == 0
    assert sorted(read) == ["mmmb_cn.tsv", "mmmb_en.tsv", "mmmb_pt.tsv"]


def test_metrics_of_a_killed_run(tmp_path: Path) -> None:
    path, good = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 1, "loss": 2.0}'
    path.write_text(f'{good}\n{{"kind": "tra')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 2.0}]
    path.write_text('{"kind": "tra')
    assert read_metrics(tmp_path) == []
    path.write_text("")
    assert read_metrics(tmp_path) == []
    path.write_text(f"{good}\n{good}")  # only the line end is missing
    assert len(read_metrics(tmp_path, "train")) == 2
    path.write_text(f'{good}\n{{"kind": "tra\n{good}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is no JSON"):
        read_metrics(tmp_path)
    path.write_text(f"{good}\n[]\n")
    with pytest.raises(DataError, match=r"line 2 must be an object with kind and step, got '\[\]'"):
        read_metrics(tmp_path)
