"""Text, ids and labels against the released formatter: its own outputs, and an independent rewrite of its rules."""

from __future__ import annotations

import pytest

from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN_ID
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.templates import move_image_markers, render_conversation
from parrot_sys.errors import DataError


@pytest.mark.parametrize("index", range(8))
def test_conversations_equal_the_released_ones(index, expected, processor):
    case = expected["conversations"][index]
    result = processor.format_conversation(case["source"]["conversations"])
    assert result["prompt"] == case["prompt"]
    assert result["input_ids"] == case["input_ids"]
    assert result["labels"] == case["labels"]
    assert all(type(i) is int for i in result["input_ids"] + result["labels"])


def test_every_conversation_of_the_fixture_is_compared(expected):
    assert len(expected["conversations"]) == 8


def test_generation_prompts_equal_the_released_ones(expected, processor):
    assert expected["generate"]
    for case in expected["generate"]:
        turns = [{"from": "human", "value": "<image>\n" + case["query"]}]
        result = processor.format_conversation(turns, add_generation_prompt=True)
        assert result["prompt"] == case["prompt"]
        assert result["input_ids"] == case["prompt_ids"]
        assert set(result["labels"]) == {IGNORE_ID}


def released_format(tokenizer, turns):
    """The rules in their plainest form: one turn after the other, one chunk after the other."""
    header = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids)
    ids, labels = [], []
    for i, (role, text) in enumerate(turns):
        text = f"<|im_start|>{role}\n{text}<|im_end|>" + ("\n" if i < len(turns) - 1 else "")
        own = []
        for chunk in text.split("<image>"):
            own += [*tokenizer(chunk, add_special_tokens=False).input_ids, IMAGE_TOKEN_ID]
        own.pop()
        ids += own
        labels += [IGNORE_ID] * header + own[header:] if role == "assistant" else [IGNORE_ID] * len(own)
    return ids, labels


@pytest.mark.parametrize(
    "answers",
    [
        ["A cat."],
        ["\n\nA cat.", "Two\n"],  # newlines at the edges merge with those of the template
        ["Uma maçã", "三个苹果", "кошка 🐈"],
    ],
)
def test_several_turns_equal_a_plain_rewrite(answers, processor):
    turns, plain = [], [("system", "You are a helpful assistant.")]
    for i, answer in enumerate(answers):
        question = "<image>\nWhat?" if i == 0 else f"And {i}?"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        plain += [("user", question), ("assistant", answer)]
    result = processor.format_conversation(turns)
    ids, labels = released_format(processor.tokenizer, plain)
    assert result["input_ids"] == ids
    assert result["labels"] == labels


def test_labels_end_with_the_newline_except_in_the_last_turn(processor):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    result = processor.format_conversation(turns)
    learned = [i for i in result["labels"] if i != IGNORE_ID]
    assert processor.tokenizer.decode(learned) == "b<|im_end|>\nb<|im_end|>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("  Look <image> here ", "<image>\nLook  here"),
        ("<image>", "<image>"),
        ("  no marker ", "  no marker "),  # only turns with a marker are stripped
        ("<image> and <image>", "<image>\n<image>\nand"),  # every image keeps its marker
    ],
)
def test_markers_move_to_the_start_of_their_turn(text, wanted):
    assert move_image_markers(text) == wanted


def test_several_images_in_several_turns_keep_their_order(processor):
    turns = [
        {"from": "human", "value": "<image><image>\nboth?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "and <image>?"},
        {"from": "gpt", "value": "no"},
    ]
    result = processor.format_conversation(turns)
    assert result["input_ids"].count(IMAGE_TOKEN_ID) == 3
    assert "user\n<image>\n<image>\nboth?" in result["prompt"]
    assert "user\n<image>\nand ?" in result["prompt"]


def test_a_given_system_turn_replaces_the_default():
    segments = render_conversation([{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"}])
    assert (
        "".join(s.text for s in segments) == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )


def test_the_callers_turns_are_not_changed(processor, turns):
    given = turns("<image>What?")
    processor.format_conversation(given, add_generation_prompt=True)
    assert given == turns("<image>What?")


@pytest.mark.parametrize(
    ("turns", "message"), [([], "at least one turn"), ([{"from": "user", "value": "x"}], "'user'")]
)
def test_wrong_turns_are_errors(turns, message, processor: ParrotProcessor):
    with pytest.raises(DataError, match=message):
        processor.format_conversation(turns)


@pytest.mark.parametrize("turn", [{"from": "human"}, {"from": "human", "value": None}, {"value": "x"}, "text"])
def test_a_turn_of_another_form_is_an_error(turn):
    with pytest.raises(DataError, match=r"turn 1 must be \{\"from\": \.\.\., \"value\": text\}, got"):
        render_conversation([{"from": "human", "value": "a"}, turn])
