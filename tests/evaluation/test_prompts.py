"""Prompts and answer clean-up of the public wrapper."""

from __future__ import annotations

import pytest

from parrot_sys.data.constants import LANGUAGES
from parrot_sys.evaluation.prompts import clean_answer, other_language, question_prompt
from parrot_sys.evaluation.tsv import Question

ENGLISH = "Answer with the option's letter from the given choices directly."


def question(**more: object) -> Question:
    values = {
        "index": 1,
        "question": "What?",
        "options": {"A": "cat", "C": "dog"},
        "answer": "A",
        "image_key": "1",
        "group": 1,
    }
    return Question(**{**values, **more})  # type: ignore[arg-type]


def test_layout() -> None:
    assert question_prompt(question(), "en") == f"<image>\nWhat?\nA. cat\nC. dog\n{ENGLISH}"
    assert question_prompt(question(hint="Look."), "en").startswith("<image>\nLook.\nWhat?\nA. cat")


def test_instruction_language() -> None:
    endings = {language: question_prompt(question(), language).split("\n")[-1] for language in LANGUAGES}
    assert len(set(endings.values())) == 6
    # Chinese text makes the instruction Chinese in any data set, whether it stands in question, option or hint
    for change in ({"question": "什么"}, {"options": {"A": "猫", "B": "dog"}}, {"hint": "看"}):
        assert question_prompt(question(**change), "en").endswith(endings["zh"])


@pytest.mark.parametrize(
    ("response", "cleaned"),
    [
        ("B", "B"),
        (" B. dog ", "B"),
        ("we say B", "B"),
        ("I say B", "I"),
        ("(B)", "B"),
        ("The answer is option b", "b"),
        ("my answer: dog.", "dog"),
        ("A dog", "A"),
        ("dog", "dog"),
        ("Bird", "Bird"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_answer_of_english_prompts(response: str, cleaned: str) -> None:
    assert clean_answer(response, f"What?\n{ENGLISH}") == cleaned


def test_other_prompts_keep_the_answer() -> None:
    assert (
        clean_answer(" B. cachorro ", "O que?\nResponda diretamente com a letra da opção das escolhas dadas.")
        == "B. cachorro"
    )


def test_other_language_is_a_permutation_without_fixed_point() -> None:
    assert {other_language(language) for language in LANGUAGES} == set(LANGUAGES)
    assert all(other_language(language) != language for language in LANGUAGES)
