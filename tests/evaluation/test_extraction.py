# ruff: noqa: RUF001 -- letters of other scripts are what is read here
"""Option extraction against rows that the public kit scored, and the corners of its rules one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot_sys.errors import ConfigError
from parrot_sys.evaluation import extract_option
from parrot_sys.evaluation.extraction import beside

FIXTURE = Path(__file__).parents[1] / "fixtures" / "option_extraction.json"
ANIMALS = {"A": "cat", "B": "dog", "C": "fish", "D": "bird"}
LONG = {"A": "a very long option text about cats", "B": "another long option text about dogs"}


@pytest.mark.parametrize("rules", ["current", "2025", "2024"])
def test_matches_the_public_kit(rules: str) -> None:
    rows = json.loads(FIXTURE.read_text())
    assert len(rows) == 398
    wrong = [
        (row, got)
        for row in rows
        if (got := extract_option(row["prediction"], row["options"], rules=rules)) != (row[rules] or None)
    ]
    assert not wrong
    other = {"current": "2025", "2025": "2024", "2024": "current"}[rules]
    assert sum(row[rules] != row[other] for row in rows) > 60  # the versions differ on what is compared


@pytest.mark.parametrize(
    ("prediction", "options", "current", "old"),
    [
        # the letter's first position: fourth word from the end still counts, fifth does not
        ("B is what I see", LONG, None, "B"),
        ("B is what it", LONG, "B", "B"),
        # first occurrence decides, also when the letter comes again at the end
        ("B it is so I say B", LONG, None, "B"),
        # two letters: only the current rules read "answer is"
        ("A or B? The correct answer is **B**", LONG, "B", None),
        ("the ANSWER  IS a", LONG, "A", None),
        # without regard to case, any word that starts with a to d
        ("the answer is dog", ANIMALS, "D", "B"),
        # a letter that is no option falls through to the text rule
        ("the answer is dog", {"A": "a cat", "B": "dog"}, None, "B"),
        ("answer is a dog", {"B": "a dog", "C": "a cat"}, "B", "B"),
        # letters outside the options do not count
        ("D", LONG, None, None),
        ("C", {"A": "x", "B": "y", "C": "z"}, "C", "C"),
        # a refusal wins over a letter; an API failure falls through to the text rule
        ("I can't process this file. B", ANIMALS, "Z", "Z"),
        ("I'm sorry, but without the image provided I cannot say", ANIMALS, "Z", "Z"),
        ("Failed to obtain answer via API dog", {**ANIMALS, "A": "a cat on a mat"}, "B", "B"),
        # Z only counts when no option letter occurs
        ("A Z", ANIMALS, "A", "A"),
        ("Z, maybe", ANIMALS, "Z", "Z"),
        # characters that are replaced, and some that are not
        ("{B}#!", ANIMALS, "B", "B"),
        ("'B'", ANIMALS, None, None),
        ("B?", ANIMALS, None, None),
        # text rule: one contained option, whatever the case; the current rules refuse more than twice the option text
        ("DOG", ANIMALS, "B", "B"),
        ("a car", {"A": "a red car", "B": "a car"}, "B", "B"),
        ("a red car", {"A": "a red car", "B": "car"}, None, None),
        ("x" * 25 + "dog", ANIMALS, "B", "B"),
        ("x" * 26 + "dog", ANIMALS, None, "B"),
        # numbers as options and predictions, as a spreadsheet gives them
        (12, {"A": 12, "B": 13}, "A", "A"),
        (float("nan"), ANIMALS, None, None),
        ("", {"A": "x", "B": "y"}, None, None),
    ],
)
def test_rules(prediction: object, options: dict[str, str], current: str | None, old: str | None) -> None:
    assert extract_option(prediction, options) == current
    assert extract_option(prediction, options, rules="2024") == old


@pytest.mark.parametrize(
    ("prediction", "options", "between"),
    [
        ("B is what I see", LONG, None),  # the position, as in `current`
        ("B is what it", LONG, "B"),
        ("x" * 25 + "dog", ANIMALS, "B"),  # the length, as in `current`
        ("x" * 26 + "dog", ANIMALS, None),
        ("A or B? The correct answer is **B**", LONG, None),  # no "answer is", as in `2024`
        ("the answer is dog", ANIMALS, "B"),
        ("the ANSWER  IS a", LONG, None),
    ],
)
def test_rules_of_2025(prediction: str, options: dict[str, str], between: str | None) -> None:
    assert extract_option(prediction, options, rules="2025") == between


LENIENT = {
    "答案是A": "A",
    "答案：Ｂ": "B",
    "正确答案为【C】": "C",
    "（Ｄ）": "D",
    "选C。": "C",
    "選B": "B",
    "B，因为它有耳朵": "B",
    "答案是A，因为这不是B": "A",
    "答案不是A，答案是B": "B",
    "「D」": "D",
    "الإجابة هي ب": "B",
    "الإجابة الصحيحة هي (ج)": "C",
    "ب": "B",
    "أ،": "A",
    "الجواب: د": "D",
    "A resposta correta é B porque late.": "B",
    "Doğru cevap B'dir.": "B",
    "Ответ (C), потому что это рыба": "C",
    # two options, an article, a word with the letter in it, an option that does not exist
    "答案是A或B": None,
    "A, ou B": None,
    "A cat sits on the mat over there": None,
    "ABC是字母": None,
    "答案是E": None,
    "الإجابة هي ه": None,
}


@pytest.mark.parametrize("answer", LENIENT)
def test_lenient_reads_other_scripts(answer: str) -> None:
    options = {"A": "1111", "B": "2222", "C": "3333", "D": "4444"}
    assert extract_option(answer, options, rules="lenient") == LENIENT[answer]


LETTERS = st.sampled_from("ABCD")
PIECES = st.lists(
    st.one_of(
        st.sampled_from(["A", "B", "Z", "Ａ", "ب", "答案是", "answer is", "，", "。", " ", "cat", "**", "الإجابة"]),
        st.text(max_size=4),
    ),
    max_size=6,
)


@given(pieces=PIECES)
def test_lenient_only_adds_to_the_current_rules(pieces: list[str]) -> None:
    answer = "".join(pieces)
    read, lenient = extract_option(answer, ANIMALS), extract_option(answer, ANIMALS, rules="lenient")
    assert lenient in {*ANIMALS, "Z", None}
    assert read is None or lenient == read


@given(
    letter=LETTERS,
    wide=st.booleans(),
    before=st.text("的是为选择答案正确，。：（「【 \u3000\n", max_size=6),
    after=st.text("的吧呢。，！）」】\u3000\n", max_size=6),
)
def test_lenient_reads_any_letter_between_chinese(letter: str, wide: bool, before: str, after: str) -> None:
    shown = chr(ord(letter) + 0xFEE0) if wide else letter
    assert extract_option(f"{before}{shown}{after}", ANIMALS, rules="lenient") == letter


def test_what_stands_beside() -> None:
    assert [beside(rules) for rules in ("current", "2025", "2024")] == ["lenient"] * 3
    assert beside("lenient") == "current"


def test_options_are_left_as_they_are() -> None:
    options = {"A": "Cat", "B": "Dog"}
    extract_option("dog", options)
    assert options == {"A": "Cat", "B": "Dog"}


def test_unknown_rules() -> None:
    with pytest.raises(ConfigError, match=r"rules must be one of current, 2025, 2024, lenient, got '2023'"):
        extract_option("A", ANIMALS, rules="2023")  # type: ignore[arg-type]


def test_import_is_cheap() -> None:
    code = "import sys, parrot_sys.evaluation; print([m for m in ('torch', 'megatron', 'pandas') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
