"""Running tables with a scripted model: resume, settings, files for the public kit, routing checks, scores, report."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot_sys.errors import CheckpointError, ConfigError, DataError
from parrot_sys.evaluation.headlines import headline
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.main import evaluate, summary
from parrot_sys.evaluation.report import ReportInput, build_report, load_scores
from parrot_sys.evaluation.runner import load_tables, logit_changes, make_items
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import picture, write_table


@pytest.fixture
def data(three_languages: Path) -> Path:
    return three_languages


def test_scores_and_report(data: Path, tmp_path: Path) -> None:
    model = Scripted()
    evaluate(config(data, routing=("model", "off", "other-language")), model)
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report", notes=["Some note."]))
    everywhere = {"en": 100.0, "zh": 100.0, "pt": 100.0}
    assert {key: content[key] for key in ("style", "concept")} == {"style": everywhere, "concept": everywhere}
    assert list(content["style"]) == ["en", "zh", "pt"]
    # always answering A: one of three style rows, two of three concept rows; of the questions only number 4
    off = content["details"]["routing"]["off"]
    assert off["style"]["pt"] == {"plain": pytest.approx(100 / 3), "circular": 0.0, "n": 3, "n_questions": 2}
    assert off["concept"]["pt"] == {"plain": pytest.approx(200 / 3), "circular": 50.0, "n": 3, "n_questions": 2}
    assert content["details"]["experts"]["style"]["zh"] == [0.25, 0.75]
    assert content["details"]["logit_change"]["concept"]["en"] == {"off": 1.0, "other-language": 1.0}
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["style"] == content["style"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "> Some note." in text
    assert "| **plain** | 100.0 | 100.0 | 100.0 | 100.0 |" in text
    assert "| routing off, circular | 0.0 | 0.0 | 0.0 | 0.0 |" in text
    assert "| guessing, plain | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    for image in ("accuracy.png", "category_style.png", "experts_concept.png"):
        assert f"]({image})" in text
        assert (tmp_path / "report" / image).stat().st_size > 5000
    assert "plain *, routing off | 33.3 | 33.3 | 33.3 |" in summary(tmp_path / "out")


def test_other_language_guides_with_the_next_language_that_is_there(data: Path) -> None:
    model = Scripted()
    evaluate(config(data, routing=("other-language",), languages=("en", "pt")), model)
    guides = dict(zip(((language, index) for language, _, index in model.asked), model.guides, strict=True))
    assert "cn?\nA. 猫" in str(guides["en", 1])  # zh comes after en, although zh itself is not evaluated
    assert "en?\nA. cat" in str(guides["pt", 3])  # ar, tr and ru have no table


def test_other_language_needs_the_same_rows(data: Path) -> None:
    path = data / "mmmb_cn.tsv"
    path.write_text(
        "\n".join(
            line
            for line in path.read_text().split("\n")
            if not line.startswith("1000003") and "\t1000003\t" not in line
        )
    )
    with pytest.raises(DataError, match=r"mmmb_cn\.tsv lacks index 1000003 of .*mmmb_en\.tsv"):
        evaluate(config(data, routing=("other-language",), languages=("en",)), Scripted())
    tables = load_tables([data / "mmmb_en.tsv"], (), None)
    with pytest.raises(DataError, match="needs mmmb in a second language"):
        make_items(tables[0], "other-language", {"en": tables[0]})


def test_killed_run_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    model = Scripted()
    model.fail_after = 8  # in the second table
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(data), model)
    stores = sorted((tmp_path / "out").rglob("*.jsonl"))
    assert [len(path.read_text().splitlines()) - 1 for path in stores] == [6, 2]
    with stores[1].open("a") as file:  # a kill in the middle of a line
        file.write('{"index": 3, "resp')
    again = Scripted()
    evaluate(config(data), again)
    assert sorted(model.asked + again.asked) == sorted(
        (language, "model", index) for language in ("en", "zh", "pt") for index in (1, 2, 3, 4, 1_000_001, 1_000_003)
    )
    third = Scripted()
    evaluate(config(data, rules="2024", batch_size=5), third)  # rules and batch size do not decide answers
    assert third.asked == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_answers_chosen_among_numbers_that_are_none_are_not_taken_over(data: Path, tmp_path: Path, number: str) -> None:
    evaluate(config(data, languages=("en",)), Scripted())
    (path,) = (tmp_path / "out").rglob("*.jsonl")
    path.write_text(path.read_text().replace("[0.5, 0.5]", f"[{number}, 0.5]", 1))
    with pytest.raises(DataError, match=rf"line 2 is damaged \({number} is no number\)"):
        evaluate(config(data, languages=("en",)), Scripted())


def test_other_checkpoint_is_refused_or_starts_anew(data: Path) -> None:
    evaluate(config(data, languages=("en",)), Scripted())
    other = Scripted(answer=lambda item, routing: "B")
    other.settings = {"checkpoint": "def", "mode": "generate"}
    with pytest.raises(ConfigError, match=r"checkpoint: 'abc' -> 'def'.*--overwrite"):
        evaluate(config(data, languages=("en",)), other)
    evaluate(config(data, languages=("en",), overwrite=True), other)
    assert len(other.asked) == 6
    assert load_scores(data.parent / "out")["style"]["model"]["en"]["scores"]["plain"] == pytest.approx(200 / 3)


def test_changed_table_is_refused(data: Path) -> None:
    evaluate(config(data, languages=("en",)), Scripted())
    path = data / "mmmb_en.tsv"
    path.write_text(path.read_text().replace("dog", "hog"))
    with pytest.raises(ConfigError, match="table:"):
        evaluate(config(data, languages=("en",)), Scripted())


def test_limits(data: Path) -> None:
    model = Scripted()
    evaluate(config(data, languages=("en",), limit=1, routing=("model", "off")), model)
    assert {index for _, _, index in model.asked} == {1, 1_000_001, 3, 1_000_003}
    more = Scripted()
    evaluate(config(data, languages=("en",), ablation_limit=1, routing=("model", "off")), more)
    assert {index for _, routing, index in more.asked if routing == "model"} == {2, 4}  # the rest was there
    assert not [index for _, routing, index in more.asked if routing == "off"]


def test_files_for_the_public_kit(data: Path, tmp_path: Path) -> None:
    answers = {1: "=A", 2: "B\x07", 3: "", 4: "A. cat", 1_000_001: "x\u2028y", 1_000_003: " dog\n"}
    model = Scripted(answer=lambda item, routing: answers[item.question.index])
    evaluate(config(data, languages=("en", "pt"), name="parrot"), model)
    folder = tmp_path / "out" / "mmmb" / "model"
    frame = pd.read_excel(folder / "parrot_MMMB_pt.xlsx")
    assert sorted(frame.columns) == ["A", "B", "answer", "category", "index", "prediction", "question", "split"]
    assert frame["index"].tolist() == [1, 2, 3, 4, 1_000_001, 1_000_003]
    assert frame["index"].dtype == "int64"
    # text stays text, control characters are dropped, and only English answers are cut to their letter
    assert frame["prediction"].fillna("").tolist() == ["=A", "B", "", "A. cat", "x\u2028y", "dog"]
    assert pd.read_excel(folder / "parrot_MMMB_en.xlsx")["prediction"].fillna("").tolist()[3] == "A"
    tsv = pd.read_csv(folder / "parrot_MMMB_pt.tsv", sep="\t")
    assert tsv["prediction"].tolist()[0] == "=A"
    assert Scripted().asked == []
    again = Scripted()
    evaluate(config(data, languages=("pt",), name="parrot"), again)  # odd answers survive the way through the file
    assert again.asked == []


def test_one_expert_has_one_route(data: Path) -> None:
    """Another language's route is the same then, which does not mean that the expert is bypassed."""
    model = Scripted(change=0.5)
    asked = model.logit_change
    model.logit_change = lambda items, routing: asked(items, routing) if routing == "off" else 0.0  # type: ignore[method-assign]
    notes = {note for result in evaluate(config(data, overwrite=True), model) for note in result["notes"]}
    assert any(note.startswith("Routing 'other-language' changes no logit over") for note in notes)
    model.has_choice = False
    notes = {note for result in evaluate(config(data, overwrite=True), model) for note in result["notes"]}
    assert not any("changes no logit" in note for note in notes)
    assert "There is one expert: the language of a question cannot change its route." in notes


def test_experts_that_do_nothing_are_noted(data: Path) -> None:
    """As the best expert alone does where its weight is nearly 0: that is a result, no mistake of the user."""
    (result,) = evaluate(config(data, languages=("en",), overwrite=True), Scripted(change=0.0))
    assert "Routing 'off' changes no logit over 6 questions: there the experts do nothing." in result["notes"]
    with pytest.raises(CheckpointError, match=r"changes the logits .* by nan, wanted a finite number"):
        evaluate(config(data, languages=("en",)), Scripted(change=math.nan))
    without = Scripted(change=0.0)
    without.has_experts = False
    evaluate(config(data, languages=("en",)), without)  # nothing to bypass
    with pytest.raises(ConfigError, match=r"routing model off needs experts, but .* has none or does not use them"):
        evaluate(config(data, languages=("en",), routing=("model", "off")), without)
    (table,) = load_tables([data / "mmmb_en.tsv"], (), None)
    parts = {"style": make_items(table, "off", {})}
    assert logit_changes(parts, Scripted(change=0.5), "off") == {"style": 0.5}


def test_tables_that_do_not_go_together(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no table for language 'ru'; the given data has en, zh, pt"):
        load_tables([data], ("ru",), None)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mmmb_en.tsv").write_text((data / "mmmb_en.tsv").read_text())
    with pytest.raises(DataError, match="are both mmmb in en"):
        load_tables([data, tmp_path / "more"], (), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"data": ()}, "data must name"),
        ({"routing": ("off", "off")}, "routing must name each"),
        ({"output": Path("m/out"), "checkpoint": Path("m")}, "output must lie outside the checkpoint"),
    ],
)
def test_bad_settings(data: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(data, **change)


def test_headline_follows_the_kit() -> None:
    names = ["MMMB_en", "MMBench_dev_cn", "CCBench", "MyCircularSet", "style"]
    assert [headline(name) for name in names] == ["plain", "circular", "circular", "circular", "plain"]


def test_report_without_scores(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run parrot eval first"):
        build_report(ReportInput(evaluation=tmp_path, output=tmp_path))


def test_report_with_training_curves(data: Path, tmp_path: Path) -> None:
    evaluate(config(data, languages=("en",)), Scripted())
    run = tmp_path / "run"
    run.mkdir()
    records: list[dict[str, Any]] = [{"kind": "train", "step": s, "loss": 3.0 / s} for s in (1, 2, 3)]
    records += [{"kind": "validation", "step": 3, "loss": 1.5}, {"kind": "summary", "step": 3, "seconds": 9}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "r", runs={"stage 1": run}))
    assert content["details"]["training"]["stage 1"] == {
        "steps": 3,
        "first_loss": 3.0,
        "last_loss": 1.0,
        "validation_loss": 1.5,
    }
    assert (tmp_path / "r" / "loss.png").stat().st_size > 5000
    assert "| stage 1 | 3 | 3.000 | 1.000 | 1.500 |" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.parametrize(
    "rules", ["current", *(pytest.param(year, marks=pytest.mark.slow) for year in ("2025", "2024")), "lenient"]
)
def test_lenient_rules_stand_next_to_those_of_the_kit(data: Path, tmp_path: Path, rules: str) -> None:
    model = Scripted(answer=lambda item, routing: f"答案是{item.question.answer}")  # no version of the kit reads it
    evaluate(config(data, languages=("zh",), rules=rules), model)
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report"))
    kit, lenient = (0.0, 100.0)
    own, other = (lenient, kit) if rules == "lenient" else (kit, lenient)
    assert content["style"] == {"zh": own}
    cell = content["details"]["cells"]["style"]["zh"]
    assert cell["beside"]["rules"] == ("current" if rules == "lenient" else "lenient")
    assert (cell["plain"], cell["beside"]["plain"]) == (own, other)
    assert (cell["unmatched"], cell["beside"]["unmatched"]) == ((0, 3) if rules == "lenient" else (3, 0))
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"| plain, {cell['beside']['rules']} rules | {other} | {other} |" in text
    assert ("which no public kit uses" in text) == (rules == "lenient")
    assert f"plain, {cell['beside']['rules']} rules | {other} |" in summary(tmp_path / "out")


def test_likelihoods_have_no_second_rules(data: Path, tmp_path: Path) -> None:
    model = Scripted()
    model.settings = {**model.settings, "mode": "likelihood"}
    evaluate(config(data, languages=("en",)), model)
    assert "beside" not in load_scores(tmp_path / "out")["style"]["model"]["en"]["scores"]


def test_all_bad_questions_are_named_before_the_first_answer(data: Path) -> None:
    model = Scripted()
    model.problems = {2: "its picture is upside down", 1_000_003: "too long"}
    with pytest.raises(DataError) as caught:
        evaluate(config(data, languages=("en", "pt"), routing=("model", "off")), model)
    lines = str(caught.value).split("\n")
    assert lines[1:5] == [
        f"  {data}/mmmb_en.tsv, row 3, index 2: its picture is upside down",
        f"  {data}/mmmb_en.tsv, row 7, index 1000003: too long",
        f"  {data}/mmmb_pt.tsv, row 3, index 2: its picture is upside down",
        f"  {data}/mmmb_pt.tsv, row 7, index 1000003: too long",
    ]
    assert lines[5].startswith(f"4 questions of {data}/mmmb_en.tsv, {data}/mmmb_pt.tsv cannot be asked; fix the table")
    assert model.asked == []


def test_bad_questions_count_as_wrong_and_stand_in_the_report(data: Path, tmp_path: Path) -> None:
    model = Scripted()
    model.problems = {2: "its picture is upside down"}
    evaluate(config(data, languages=("en",), on_bad_question="wrong"), model)
    assert 2 not in {index for _, _, index in model.asked}
    content = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "report"))
    assert content["style"]["en"] == pytest.approx(200 / 3)
    cell = content["details"]["cells"]["style"]["en"]
    assert (cell["n"], cell["unmatched"], cell["bad_questions"]) == (3, 0, 1)
    assert (cell["beside"]["plain"], cell["beside"]["unmatched"]) == (pytest.approx(200 / 3), 0)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "row 3, index 2: its picture is upside down" in text
    assert "| bad questions | 1 | 1 |" in text
    kit = pd.read_excel(next((tmp_path / "out").rglob("*.xlsx")))
    assert kit.loc[kit["index"] == 2, "prediction"].isna().all()
    fixed = Scripted()
    evaluate(config(data, languages=("en",)), fixed)  # once it can be asked, only it is
    assert {index for _, _, index in fixed.asked} == {2}


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_questions_that_turn_out_bad_leave_their_neighbours(data: Path, batch_size: int) -> None:
    def refuse(item: Item, routing: str) -> str:
        if item.question.index in (2, 1_000_001):
            raise DataError("this one not")
        return item.question.answer

    flags: dict[str, Any] = {"languages": ("en",), "batch_size": batch_size}
    with pytest.raises(DataError, match=r"mmmb_en\.tsv, row 3, index 2: this one not; fix the table"):
        evaluate(config(data, **flags), Scripted(answer=refuse))
    (result,) = evaluate(config(data, on_bad_question="wrong", **flags), Scripted(answer=refuse))
    assert [bad["index"] for bad in result["bad_questions"]] == [2, 1_000_001]
    assert result["parts"]["style"]["rows"]["right"] == [1, 0, 0]
    assert result["parts"]["concept"]["rows"]["right"] == [1, 1, 1]


def test_guiding_questions_that_cannot_be_asked(data: Path) -> None:
    path = data / "mmmb_cn.tsv"
    path.write_text(path.read_text().replace("cn?", "", 1))
    flags: dict[str, Any] = {"languages": ("en",), "routing": ("other-language",)}
    with pytest.raises(
        DataError, match=r"mmmb_en\.tsv, row 2, index 1: its guiding question, mmmb_cn\.tsv, row 2, cannot"
    ):
        evaluate(config(data, **flags), Scripted())
    (result,) = evaluate(config(data, on_bad_question="wrong", **flags), Scripted())
    assert [bad["index"] for bad in result["bad_questions"]] == [1]


ROW_PROBLEMS: dict[str, Any] = {
    "question": "",
    "answer": "E",
    "image": "99",
    "g_index": "one",
    "history": "[[1]]",
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    problems=st.dictionaries(st.integers(0, 7), st.sampled_from([*ROW_PROBLEMS, "model", "late"]), max_size=8),
    batch_size=st.integers(1, 9),
)
def test_any_bad_questions_among_any_others(tmp_path: Path, problems: dict[int, str], batch_size: int) -> None:
    """Rows in are rows reported; each bad one is named and wrong, each other one is asked once and scored."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    rows = [
        {"index": n, "question": "q?", "A": "x", "B": "y", "answer": "AB"[n % 2], "image": picture(), "g_index": n}
        | {"history": "[]"}
        | ({kind: ROW_PROBLEMS[kind]} if (kind := problems.get(n, "")) in ROW_PROBLEMS else {})
        for n in range(8)
    ]
    write_table(folder / "data" / "mine_en.tsv", rows)

    def reply(item: Item, routing: str) -> str:
        if problems.get(item.question.index) == "late":
            raise DataError("late")
        return item.question.answer

    model = Scripted(answer=reply)
    model.problems = {n: "model" for n, kind in problems.items() if kind == "model"}
    (result,) = evaluate(config(folder / "data", on_bad_question="wrong", batch_size=batch_size), model)
    assert [bad["index"] for bad in result["bad_questions"]] == sorted(problems)
    assert all(bad["row"] == bad["index"] + 2 and bad["reason"] for bad in result["bad_questions"])
    part = result["parts"]["mine"]
    assert part["rows"]["index"] == list(range(8))
    assert part["rows"]["right"] == [int(n not in problems) for n in range(8)]
    assert part["scores"]["bad_questions"] == len(problems)
    early = sorted(n for n, kind in problems.items() if kind != "late")
    strict = Scripted()
    strict.problems = model.problems
    if early:
        with pytest.raises(DataError) as caught:
            evaluate(config(folder / "data", overwrite=True), strict)
        named = {int(index) for index in re.findall(r"row \d+, index (\d+):", str(caught.value))}
        in_table = {n for n in early if problems[n] in ROW_PROBLEMS}
        assert named == (in_table or set(early))  # what is wrong with the table itself shows before the model is loaded
        assert strict.asked == []
