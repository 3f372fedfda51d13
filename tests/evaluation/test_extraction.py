"""Option extraction against rows that the public kit scored, and the corners of its rules one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parrot_sys.errors import ConfigError
from parrot_sys.evaluation import extract_option

FIXTURE = Path(__file__).parents[1] / "fixtures" / "option_extraction.json"
ANIMALS = {"A": "cat", "B": "dog", "C": "fish", "D": "bird"}
LONG = {"A": "a very long option text about cats", "B": "another long option text about dogs"}


@pytest.mark.parametrize("rules", ["current", "2024"])
def test_matches_the_public_kit(rules: str) -> None:
    rows = json.loads(FIXTURE.read_text())
    assert len(rows) == 140
    wrong = [
        (row, got)
        for row in rows
        if (got := extract_option(row["prediction"], row["options"], rules=rules)) != (row[rules] or None)
    ]
    assert not wrong


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


def test_options_are_left_as_they_are() -> None:
    options = {"A": "Cat", "B": "Dog"}
    extract_option("dog", options)
    assert options == {"A": "Cat", "B": "Dog"}


def test_unknown_rules() -> None:
    with pytest.raises(ConfigError, match=r"'current' or '2024', got '2023'"):
        extract_option("A", ANIMALS, rules="2023")  # type: ignore[arg-type]


def test_import_is_cheap() -> None:
    code = "import sys, parrot_sys.evaluation; print([m for m in ('torch', 'megatron', 'pandas') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
