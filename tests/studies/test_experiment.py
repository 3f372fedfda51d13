"""Means, spreads and paired differences by hand; reports of unfinished results; the programs' command lines."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parrot_sys.markdown_tables import interval_text
from studies.catalog import EXPERIMENTS
from studies.experiment import Experiment, Variant, compare_variants, experiment_content, summarize, write_result
from studies.experiment_report import write_report
from studies.measures import accuracies, answer_habits
from studies.recipes import provenance
from tests.studies.evaluations import evaluations_of

ROOT = Path(__file__).parents[2]


def record(en: float, zh: float) -> dict[str, Any]:
    return {
        "accuracy": {"style": {"en": en, "zh": zh, "mean": (en + zh) / 2}},
        "n": {"style": {"en": 40, "zh": 40}},
        "commits": ["abc"],
    }


STUDY = Experiment(
    title="A study",
    about="For tests.",
    variants=tuple(
        Variant(name=name, description=name, evaluate=lambda run: pytest.fail("nothing is trained here"))
        for name in ("experts, balanced", "plain, balanced", "experts, imbalanced", "plain, imbalanced")
    ),
    comparisons=tuple(
        (f"experts - plain, {mix}", f"experts, {mix}", f"plain, {mix}") for mix in ("balanced", "imbalanced")
    ),
    file="experiment.json",
)
RESULTS = {
    "experts, balanced": {"0": record(60, 50), "1": record(70, 40), "2": record(80, 60)},
    "plain, balanced": {"0": record(50, 50), "1": record(40, 50)},
}


def test_summary_by_hand() -> None:
    summary = summarize(RESULTS, STUDY.comparisons)
    english = summary["variants"]["experts, balanced"]["style"]["en"]
    assert english == {"mean": 70.0, "std": pytest.approx(10.0), "seeds": [60, 70, 80]}
    # paired by seed, over the two seeds that both have: +10 and +30
    difference = summary["differences"]["experts - plain, balanced"]["style"]["en"]
    assert difference == {"mean": 20.0, "std": pytest.approx(200**0.5), "seeds": [10, 30]}
    assert set(summary["differences"]) == {"experts - plain, balanced"}
    assert summarize({"a": {"0": record(1, 2)}}, ())["variants"]["a"]["style"]["mean"]["std"] is None


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_variants_and_comparisons_fit_together(name: str) -> None:
    names = [variant.name for variant in EXPERIMENTS[name].variants]
    assert len(set(names)) == len(names)
    assert all({first, second} <= set(names) for _, first, second in EXPERIMENTS[name].comparisons)


def test_report_of_unfinished_results(tmp_path: Path) -> None:
    content = experiment_content(STUDY, provenance()) | {
        "minutes": 7,
        "results": RESULTS,
        "summary": summarize(RESULTS, STUDY.comparisons),
    }
    write_result(content, tmp_path / "deep" / "experiment.json")
    assert json.loads((tmp_path / "deep" / "experiment.json").read_text())["results"] == RESULTS
    text = write_report(STUDY, content, tmp_path).read_text(encoding="utf-8")
    assert "| experts, balanced | 3 | 70.0 \u00b1 10.0 | 50.0 \u00b1 10.0 | 60.0 \u00b1 8.7 |" in text
    assert "| experts - plain, balanced | 2 | 20.0 \u00b1 14.1 | -5.0 \u00b1 7.1 | 7.5 \u00b1 3.5 |" in text
    assert "## style (n = 40 to 40 rows a language and seed)" in text
    assert (tmp_path / "style.png").stat().st_size > 5000
    assert not (tmp_path / "parts.png").exists(), "one part needs no overview"


def test_accuracies_of_an_evaluation(tmp_path: Path) -> None:
    for language, plain in (("en", 60.0), ("tr", 40.0)):
        folder = tmp_path / "mmmb" / "model"
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"plain": plain, "circular": 1.0, "n": 7}
        result = {
            "suite": "mmmb", "language": language, "dataset": f"MMMB_{language}", "routing": "model",
            "rules": "current", "settings": {"checkpoint": "abc", "table": language},
            "parts": {"style": {"scores": scores, "experts": []}},
        }  # fmt: skip
        (folder / f"m_MMMB_{language}.scores.json").write_text(json.dumps(result))
    assert accuracies(tmp_path) == (
        {"style": {"en": 60.0, "tr": 40.0, "mean": 50.0, "mean but en": 40.0}},
        {"style": {"en": 7, "tr": 7}},
    )


def test_lengths_of_answers(tmp_path: Path) -> None:
    folder = tmp_path / "mmmb" / "model"
    folder.mkdir(parents=True)
    for language, answers in (("en", ["two words", "and four of them"]), ("zh", ["\u732b"])):
        stem = f"m_MMMB_{language}"
        result = {"suite": "mmmb", "language": language, "dataset": f"MMMB_{language}", "routing": "model"}
        result |= {"settings": {}, "parts": {}}
        (folder / f"{stem}.scores.json").write_text(json.dumps(result))
        lines = [{"settings": {}}, *({"index": i, "response": answer} for i, answer in enumerate(answers))]
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values, counts = answer_habits(tmp_path)
    assert values["words"] == {"en": 3.0, "zh": 1.0, "mean": 2.0, "mean but en": 1.0}
    assert counts["words"] == {"en": 2, "zh": 1}


def test_variants_are_compared_question_by_question(tmp_path: Path) -> None:
    first, second = "experts, balanced", "plain, balanced"
    right = {
        first: {"0": "1111110100", "1": "1111111100"},
        second: {"0": "1000000100", "1": "1000001110"},
        "plain, imbalanced": {"0": "1000001110"},
    }
    evaluations = evaluations_of(tmp_path, right)
    found = compare_variants(STUDY, evaluations)
    test = found["tests"]["experts - plain, balanced"]["style"]
    assert list(test) == ["en", "tr", "all", "mean but en"]
    # of each picture: what both seeds differ by, five times 2 and once -1; languages agree
    assert (test["en"]["n"], test["en"]["first_only"], test["en"]["second_only"]) == (20, 10, 1)
    assert (test["all"]["n"], test["all"]["first_only"], test["all"]["clusters"]) == (40, 20, 10)
    sums = [2] * 5 + [-1]
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    reached = sum(abs(sum(s * abs(v) for s, v in zip(sign, sums, strict=True))) >= 9 for sign in signs)
    assert test["en"]["p"] == test["all"]["p"] == pytest.approx(reached / len(signs))
    assert "experts - plain, imbalanced" not in found["tests"]  # the first of them was not trained
    low, high = found["intervals"][first]["style"]["mean"]
    assert 0 < low < 75 < high < 100
    assert found["intervals"][first]["style"]["mean"] == pytest.approx(found["intervals"][first]["style"]["en"])

    results = {
        variant: {seed: dict(zip(("accuracy", "n"), accuracies(folder), strict=True)) for seed, folder in seeds.items()}
        for variant, seeds in evaluations.items()
    }
    for seeds in results.values():
        for run in seeds.values():
            run["commits"] = []
    content = experiment_content(STUDY, provenance()) | {"results": results, "minutes": 7}
    content["summary"] = summarize(results, STUDY.comparisons) | found
    text = write_report(STUDY, content, tmp_path / "report").read_text(encoding="utf-8")
    assert "| experts - plain, balanced | 20 / 40 | +45.0 (10 : 1, p = " in text
    assert "likelihood of the options' texts" in text
    assert f"75.0 \u00b1 7.1 {interval_text((low, high))}" in text


def test_lengths_of_variants_are_compared_too(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["answers"]
    name, first, second = experiment.comparisons[-1]
    evaluations = evaluations_of(tmp_path, {first: {"0": "111111"}, second: {"0": "111111"}})
    for variant, words in ((first, 2), (second, 5)):
        for path in evaluations[variant]["0"].rglob("*.scores.json"):
            lines = [{"settings": {}}, *({"index": i, "response": " ".join("a" * (words + i))} for i in range(6))]
            stem = path.name.removesuffix(".scores.json")
            (path.parent / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_variants(experiment, evaluations)
    test = found["tests"][name]["words"]["all"]
    assert (test["difference"], test["first_only"], test["second_only"]) == (-3.0, 0, 12)
    assert test["p"] == pytest.approx(2 / 2**6)
    low, high = found["intervals"][second]["words"]["en"]
    assert (low + high) / 2 == pytest.approx(7.5)


def test_provenance_names_machine_versions_and_commit() -> None:
    held = provenance()
    assert set(held) == {"device", "python", "versions", "commit", "clean"}
    assert held["device"]
    assert {"torch", "megatron-core"} <= set(held["versions"])


@pytest.mark.parametrize("script", ["demo.py", "experiment.py"])
def test_help_is_quick_and_teaches(script: str) -> None:
    command = [sys.executable, str(ROOT / "train" / script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--fresh" in result.stdout
    assert "runs/" in result.stdout
