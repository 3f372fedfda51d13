"""What a report says of its figures: what answers are, how sure they are, what was compared, and where it belongs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from parrot_sys import heat_maps
from parrot_sys.evaluation.items import Item, Prediction, Routing
from parrot_sys.evaluation.main import evaluate, summary
from parrot_sys.evaluation.outcomes import Outcome, compare_languages, mean_interval
from parrot_sys.evaluation.report import ReportInput, build_report
from studies.demo import Evaluations, forgetting
from studies.pipeline import Step
from tests.evaluation.scripted import Scripted, config
from tests.evaluation.tables import picture, write_table


class ByLikelihood(Scripted):
    """Two options: the right one is likelier in all by `right`, the other one by the token."""

    def __init__(self, mode: str, **more: str) -> None:
        super().__init__()
        self.settings = {"checkpoint": "abc", "mode": mode, **more}

    def predict(self, items: Sequence[Item], routing: Routing) -> list[Prediction]:
        predictions = super().predict(items, routing)
        if self.settings["mode"] != "text-likelihood":
            return predictions
        return [
            dataclasses.replace(
                prediction,
                option_scores={letter: -4.0 if letter == prediction.response else -6.0 for letter in "AB"},
                option_tokens={letter: 1 if letter == prediction.response else 3 for letter in "AB"},
            )
            for prediction in predictions
        ]


def questions(number: int, *, rotated: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Rows with a picture each, and their rotations."""
    base = [
        {"index": i, "question": f"{i}?", "A": "cat", "B": "dog", "answer": "AB"[i % 2], "split": "style",
         "image": picture((10 * i, 90, 9), (30 + i, 40)), **more}
        for i in range(1, number + 1)
    ]  # fmt: skip
    rotations = [
        {**row, "index": 1_000_000 + row["index"], "A": "dog", "B": "cat", "answer": "BA"["AB".index(row["answer"])]}
        for row in base
    ]
    return base + rotations if rotated else base


def report(data: Path, scripted: Scripted, **more: Any) -> tuple[dict[str, Any], str]:
    output = data.parent / "out"
    evaluate(config(data, output=output, overwrite=True, **more), scripted)
    content = build_report(ReportInput(evaluation=output, output=output / "report"))
    return content, (output / "report" / "report.md").read_text(encoding="utf-8")


def tables_in(text: str) -> list[list[list[str]]]:
    """Cells of every table of a Markdown text."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level > 3:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


@pytest.mark.parametrize(
    ("mode", "options"),
    [(mode, options) for mode in ("generate", "text-likelihood") for options in ("shown", "hidden")]
    + [("likelihood", "shown")],
)
@pytest.mark.parametrize("rules", ["current", "2024", "lenient"])
def test_only_figures_that_the_kit_reports_are_called_so(tmp_path: Path, mode: str, options: str, rules: str) -> None:
    write_table(tmp_path / "data" / "pets_en.tsv", questions(3))
    content, text = report(tmp_path / "data", ByLikelihood(mode), mode=mode, options=options, rules=rules)
    kits = (mode, options) == ("generate", "shown") and rules != "lenient"
    measure = content["details"]["measure"]
    assert measure["public_kit"] is kits
    assert ("is what the public kit reports" in text) is kits
    terminal = summary(tmp_path / "out")
    assert ("the accuracy that the public kit reports" in terminal) is kits
    if mode != "generate" or options == "hidden":
        assert "not what the public kit reports" in text.split("## ", 1)[0]
        assert "not what the public kit reports" in terminal
        assert measure["short"] in tables_in(text)[0][0][0]
    assert ("Option extraction" in text) == (mode == "generate")


def test_tables_that_the_kit_refuses_have_no_figure_of_it(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "pets_en.tsv", questions(3, history="[]"))
    content, text = report(tmp_path / "data", Scripted())
    assert not content["details"]["measure"]["public_kit"]
    assert "The public kit does not score all of these tables" in text


def test_likelihood_per_token_stands_beside_the_plain_one(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "pets_en.tsv", questions(4))
    content, text = report(tmp_path / "data", ByLikelihood("text-likelihood"), mode="text-likelihood")
    assert content["style"] == {"en": 100.0}
    assert content["details"]["cells"]["style"]["en"]["normalised"]["plain"] == 0.0
    assert "| plain, per token | 0.0 | 0.0 |" in text
    _, generated = report(tmp_path / "data", Scripted())
    assert "per token" not in generated


@pytest.mark.parametrize("name", ["pets_en", "mmbench_dev_en"])
@pytest.mark.parametrize("rotated", [False, True])
def test_circular_rows_stand_where_something_is_rotated(
    tmp_path: Path, name: str, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    real = heat_maps.heat_map
    monkeypatch.setattr(heat_maps, "heat_map", lambda *a, **k: (drawn.append(k), real(*a, **k))[1])
    write_table(tmp_path / "data" / f"{name}.tsv", questions(3, rotated=rotated, category="x"))
    always_a = Scripted(lambda item, routing: "A")
    content, text = report(tmp_path / "data", always_a, routing=("model", "off"))
    for words in (text.lower(), summary(tmp_path / "out")):
        assert ("circular" in words) is rotated
    circular = rotated and name.startswith("mmbench")
    assert content["details"]["headline"]["style"] == ("circular" if circular else "plain")
    assert content["style"]["en"] == (0.0 if circular else 50.0 if rotated else pytest.approx(100 / 3))
    assert ("**circular**" in text) is circular
    (counts,) = [each["counts"] for each in drawn if each["title"].endswith("accuracy per category")]
    assert counts == {"x": {"en": 3 if circular or not rotated else 6}}  # questions, or rows


def test_changes_of_logits_stand_under_the_part_where_they_were_measured(tmp_path: Path) -> None:
    rows = [*questions(2), *({**row, "index": row["index"] + 10} for row in questions(3, split="concept"))]
    for language in ("en", "cn"):
        write_table(tmp_path / "data" / f"pets_{language}.tsv", rows)
    scripted = Scripted()
    changes = {"style": {"off": 1.25, "other-language": 5.0}, "concept": {"off": 2.5, "other-language": 0.0}}
    scripted.logit_change = (  # type: ignore[method-assign]
        lambda items, routing: changes[items[0].question.split][routing]
    )
    content, text = report(tmp_path / "data", scripted)
    details = content["details"]
    assert details["logit_change"]["style"]["zh"] == {"off": 1.25, "other-language": 5.0}
    assert details["logit_change"]["concept"]["en"] == {"off": 2.5, "other-language": 0}
    assert details["logit_probes"]["style"]["en"] == {"off": 2, "other-language": 2}
    style, concept = text.split("\n## style\n", 1)[1].split("\n## concept\n", 1)
    assert "| off | 1.25 (n = 2) | 1.25 (n = 2) |" in style
    assert "| off | 2.5 (n = 3) | 2.5 (n = 3) |" in concept
    assert "2.5" not in style
    assert "| other-language | 0 (n = 3) | 0 (n = 3) |" in concept


def test_ablations_are_compared_pair_by_pair(tmp_path: Path) -> None:
    for language in ("en", "cn"):
        write_table(tmp_path / "data" / f"pets_{language}.tsv", questions(8))
    wrong = {"model": {1}, "off": {1, 2, 3, 4, 5, 6}}

    def answer(item: Item, routing: Routing) -> str:
        right = item.question.answer
        return "BA"["AB".index(right)] if item.question.index in wrong[routing] else right

    content, text = report(tmp_path / "data", Scripted(answer), routing=("model", "off"))
    tests = content["details"]["paired"]["off"]["style"]
    assert (tests["en"]["n"], tests["en"]["first_only"], tests["en"]["second_only"]) == (8, 5, 0)
    assert (tests["all"]["n"], tests["all"]["discordant"], tests["all"]["clusters"]) == (16, 10, 8)
    # both languages share their pictures: no more evidence than one of them
    assert tests["en"]["p"] == tests["all"]["p"] == pytest.approx(2 / 2**5)
    assert "| own routes - routing off | 8 / 16 | +62.5 (5 : 0, p = 0.063) |" in text
    own = [Outcome(index=i, group=i, picture=str(i), value=int(i not in wrong["model"])) for i in range(1, 9)]
    assert content["details"]["intervals"]["style"]["model"]["plain"]["mean"] == pytest.approx(
        mean_interval({"en": own, "zh": own})
    )
    off = [dataclasses.replace(each, value=int(each.index not in wrong["off"])) for each in own]
    assert compare_languages({"en": own}, {"en": off})["en"] == tests["en"]


def test_every_accuracy_has_its_interval_and_every_table_its_n(tmp_path: Path) -> None:
    for language in ("en", "cn"):
        write_table(
            tmp_path / "data" / f"pets_{language}.tsv",
            [*questions(4, category="x", **{"l2-category": "y"}), {**questions(5)[-1], "split": "concept"}],
        )
    _, text = report(tmp_path / "data", Scripted(), routing=("model", "off"))
    for header, *rows in tables_in(text):
        shown = " ".join(" ".join(row) for row in (header, *rows))
        assert "n = " in shown or "n rows" in shown or "n, all" in shown or "n pairs" in shown or "95%" in shown, shown
    for part in text.split("\n## ")[2:4]:
        rows = [line for line in part.splitlines() if line.startswith(("| **plain", "| routing off, "))]
        lines = part.splitlines()
        assert rows
        assert all(lines[lines.index(row) + 1].startswith("| 95% interval | [") for row in rows)
        assert "n rows" in part


def test_scores_of_an_earlier_version_have_no_interval(tmp_path: Path) -> None:
    write_table(tmp_path / "data" / "pets_en.tsv", questions(3))
    report(tmp_path / "data", Scripted())
    for path in (tmp_path / "out").rglob("*.scores.json"):
        content = json.loads(path.read_text())
        for part in content["parts"].values():
            del part["rows"], part["intervals"], part["normalised"], part["scores"]["beside"]
        content["logit_change"] = {"off": 1.0}
        del content["logit_changes"]
        path.write_text(json.dumps(content))
    built = build_report(ReportInput(evaluation=tmp_path / "out", output=tmp_path / "out" / "report"))
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert built["details"]["intervals"]["style"] == {}
    assert "| **plain** | 100.0 | 100.0 |" in text
    assert "| 95% interval |" not in text
    assert "plain *, routing model | 100.0 |" in summary(tmp_path / "out")


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(alphabet="ab|$\\_*[]\u732b\u6b4c\u0642\u0637\u0457 /.", min_size=1, max_size=9).filter(str.strip),
        min_size=2,
        max_size=2,
        unique_by=lambda name: " ".join(name.split()),
    )
)
def test_any_name_stays_in_its_cell_and_in_the_folder(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("names")
    rows = [{**row, "category": name, "split": name} for row, name in zip(questions(len(names)), names, strict=True)]
    write_table(folder / "data" / "pets_en.tsv", rows)
    content, text = report(folder / "data", Scripted())
    for header, *rest in tables_in(text):
        assert all(len(row) == len(header) for row in rest), text
    shown = {" ".join(row[0].split()) for table in tables_in(text) for row in table}
    assert {name.strip() for name in content if name != "details"} == {name.strip() for name in names}
    assert any("|" in cell for cell in shown) == any("|" in name for name in names)
    drawn = sorted(path.relative_to(folder / "out").as_posix() for path in folder.rglob("*.png"))
    assert len(drawn) == 2 + 2 * len(names)  # accuracies, parts; categories and experts of each part
    assert all(path.count("/") == 1 and path.startswith("report/") for path in drawn), drawn


def test_dialogues_of_a_demo_have_n_intervals_and_a_paired_test(tmp_path: Path) -> None:
    for language in ("en", "cn"):
        rows = [{**row, "split": kind, "index": row["index"] + 20 * place}
                for place, kind in enumerate(("T", "V")) for row in questions(4)]  # fmt: skip
        write_table(tmp_path / "data" / f"iit_{language}.tsv", rows)
    steps = {}
    for name, scripted in (("before", Scripted(lambda item, routing: "A")), ("after", Scripted())):
        evaluate(config(tmp_path / "data", output=tmp_path / name), scripted)
        steps[name] = Step(name=name, folder=tmp_path / name, key=name, seconds=0.0)
    text = "\n".join(forgetting(Evaluations(benchmark=steps["after"], attention=steps["after"], **steps), tmp_path))
    header, *rows = tables_in(text)[0]
    assert header[:5] == ["type", "n, all languages", "before", "after", "change"]
    assert [row[:2] for row in rows] == [["T", "8"], ["V", "8"]]
    assert all(cell.startswith(("50.0 [", "100.0 [")) for row in rows for cell in row[2:4])
    assert "| T | 4 / 8 | +50.0 (2 : 0, p = 0.500) | +50.0 (2 : 0, p = 0.500) | +50.0 (4 : 0, p = 0.500) |" in text
    assert json.loads((tmp_path / "forgetting.json").read_text())["paired"]["T"]["all"]["discordant"] == 4
