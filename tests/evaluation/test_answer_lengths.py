"""Lengths of the answers of two models, from the files that evaluations leave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.__main__ import main as parrot
from parrot_sys.errors import ConfigError, DataError
from parrot_sys.evaluation.answer_lengths import compare_answers, compare_evaluations, count_words, repeats_itself
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.main import evaluate
from tests.evaluation.scripted import Scripted, config


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("A cat.", 2), ("  um gato \n preto ", 3), ("一只猫", 3), ("猫 cat", 2), ("кошка, 🐈", 2)],
)
def test_words(text: str, words: int) -> None:
    assert count_words(text) == words


def test_a_comparison_by_hand() -> None:
    result = compare_answers([("net", "It is a net."), ("a cat", "a cat"), ("one two three", "one two three four")])
    assert (result.first.mean, result.first.median, result.first.short) == (2.0, 2, pytest.approx(2 / 3))
    assert (result.second.median, result.second.short) == (4, pytest.approx(1 / 3))
    assert result.difference == pytest.approx(4 / 3)
    assert (result.longer, result.shorter) == (2, 0)
    assert result.p == pytest.approx(2 / 4)
    assert result.margin == pytest.approx(  # Student's t with two degrees of freedom
        4.302652730 * math.sqrt(((5 / 3) ** 2 + (4 / 3) ** 2 + (1 / 3) ** 2) / 2) / math.sqrt(3)
    )
    assert math.isinf(compare_answers([("a", "b")]).margin)


def _evaluate(data: Path, output: Path, words: Callable[[Item], int], **settings: object) -> Path:
    evaluate(config(data, output=output, **settings), Scripted(lambda item, _: " ".join(["word"] * words(item))))
    return output


def test_two_evaluations(three_languages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terse = _evaluate(three_languages, tmp_path / "terse", lambda item: 1)
    wordy = _evaluate(
        three_languages,
        tmp_path / "wordy",
        lambda item: 5 if item.table.language == "en" else 3,
        languages=("en", "zh"),
    )
    result = compare_evaluations(terse, wordy)
    assert list(result) == ["MMMB_cn", "MMMB_en", "all"]  # what both answered
    assert (result["MMMB_en"].difference, result["MMMB_cn"].difference) == (4.0, 2.0)
    assert result["MMMB_en"].margin == 0.0
    assert result["all"].questions == result["MMMB_en"].questions + result["MMMB_cn"].questions
    assert result["all"].difference == pytest.approx(3.0)
    arguments = ["--evaluations", str(terse), str(wordy), "--names", "with VQAv2", "without"]
    assert parrot(["compare", *arguments, "--output", str(tmp_path / "lengths")]) == 0
    text = (tmp_path / "lengths" / "lengths.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert (
        f"| MMMB_en | {result['MMMB_en'].questions} | 1.0 | 5.0 | 1 | 5 | 100% | 0% | +4.0 ± 0.0 | 6 : 0 | 1.000 |"
        in text
    )
    assert "with VQAv2: mean words" in text
    written = json.loads((tmp_path / "lengths" / "lengths.json").read_text())
    assert written["tables"]["all"]["second"]["mean"] == result["all"].second.mean


def test_evaluations_that_cannot_be_compared(three_languages: Path, tmp_path: Path) -> None:
    english = _evaluate(three_languages, tmp_path / "english", lambda item: 1, languages=("en",))
    chinese = _evaluate(three_languages, tmp_path / "chinese", lambda item: 1, languages=("zh",))
    with pytest.raises(ConfigError, match=r"must share a table, got MMMB_en in .*english and MMMB_cn in"):
        compare_evaluations(english, chinese)
    with pytest.raises(DataError, match="is no directory"):
        compare_evaluations(english, tmp_path / "nowhere")
    scores = next(chinese.glob("*/*/*.scores.json"))
    content = json.loads(scores.read_text())
    content["settings"]["mode"] = "likelihood"
    scores.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="answers of mode likelihood"):
        compare_evaluations(english, chinese)
    table = three_languages / "mmmb_en.tsv"
    table.write_text(table.read_text().replace("cat", "dog"))
    other = _evaluate(three_languages, tmp_path / "other", lambda item: 1, languages=("en",))
    with pytest.raises(ConfigError, match=r"the tables MMMB_en of .* differ"):
        compare_evaluations(english, other)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("", False),
        ("cat", False),
        ("a cat, a dog", False),
        ("cat cat", True),
        ("A cat and a cat", True),
        ("a b a c a", False),
        ("ねこ", False),
        ("猫猫", True),
        ("黑猫和黑猫", True),
    ],
)
def test_repetition(text: str, repeats: bool) -> None:
    assert repeats_itself(text) is repeats


@given(st.lists(st.text("abcd", min_size=1), min_size=2, unique=True))
def test_only_what_comes_again_is_a_repetition(words: list[str]) -> None:
    assert not repeats_itself(" ".join(words))
    assert repeats_itself(" ".join(words * 2))
