"""Prompts and answer clean-up of the public wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.constants import IMAGE_TOKEN_ID
from parrot_sys.data.languages import MMMB_LANGUAGES
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.evaluation.items import Item
from parrot_sys.evaluation.prompts import clean_answer, other_language, question_prompt
from parrot_sys.evaluation.tsv import Question

ENGLISH = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def processor() -> ParrotProcessor:
    return ParrotProcessor.from_pretrained(Path(__file__).parents[1] / "fixtures" / "parrot_tiny" / "model")


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


CONTROL = ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<image>", "</s>", "\n", " a cat "]
TRICKY = st.lists(st.sampled_from(CONTROL), min_size=1, max_size=4).map("".join)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TRICKY, min_size=6, max_size=6), picture=st.booleans(), shown=st.booleans())
def test_texts_of_a_question_are_no_control_tokens_and_no_images(
    processor: ParrotProcessor, texts: list[str], picture: bool, shown: bool
) -> None:
    """Question, options, hint and earlier turns: as many control tokens as with harmless texts, one image at most."""

    def counts(asked: str, first: str, second: str, hint: str, before: str, answer: str) -> dict[int, int]:
        row = question(
            question=asked,
            options={"A": first, "B": second},
            hint=hint,
            history=((before, answer),),
            image_key="1" if picture else None,
        )
        prompt = question_prompt(row, "en", show_options=shown)
        turns = Item(table=cast(Any, None), question=row, prompt=prompt).turns(prompt)
        ids = processor.format_conversation(turns, add_generation_prompt=True)["input_ids"]
        special = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
        for option in row.options.values():
            assert not set(processor.encode_text(option)) & set(special)
        return {number: ids.count(number) for number in (IMAGE_TOKEN_ID, *special)}

    harmless = counts(*"abcdef")
    assert harmless[IMAGE_TOKEN_ID] == picture
    assert counts(*texts) == harmless


def test_instruction_language() -> None:
    endings = {language: question_prompt(question(), language).split("\n")[-1] for language in MMMB_LANGUAGES}
    assert len(set(endings.values())) == 6
    # Chinese text makes the instruction Chinese in any data set, whether it stands in question, option or hint
    for change in ({"question": "什么"}, {"options": {"A": "猫", "B": "dog"}}, {"hint": "看"}):
        assert question_prompt(question(**change), "en").endswith(endings["zh"])
        # ... that the wrapper knows; another language keeps its own
        first, second = question(**change).options
        assert question_prompt(question(**change), "ja").endswith(f"\n{first}または{second}?")


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


@given(held=st.sets(st.sampled_from([*MMMB_LANGUAGES, "de", "th", "pt-BR"]), min_size=2))
def test_other_language_is_a_permutation_without_fixed_point(held: set[str]) -> None:
    assert {other_language(language, held) for language in held} == held
    assert all(other_language(language, held) != language for language in held)


def test_other_language_is_the_next_one_that_is_there() -> None:
    followers = [other_language(language, MMMB_LANGUAGES) for language in MMMB_LANGUAGES]
    assert followers == ["zh", "pt", "ar", "tr", "ru", "en"]
    few = ("en", "ru", "de")
    assert {language: other_language(language, few) for language in ("en", "zh", "ru", "de")} == {
        "en": "ru",
        "zh": "ru",
        "ru": "de",
        "de": "en",
    }
    assert other_language("de", ("de",)) is None
