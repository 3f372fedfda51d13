"""Whatever a text looks like, it gets no id of a control token, and ordinary text gets the ids that it always had."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.constants import IMAGE_TOKEN, IMAGE_TOKEN_ID
from parrot_sys.data.control_tokens import TextEncoder, control_tokens
from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.parts import Part, check_text, human_turn, template
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.errors import DataError
from tests.data.tokenizers_of_all_kinds import CHATML, KINDS, make_tokenizer
from tests.data.tricky_texts import CONTROL, TRICKY, WORDS, make_processor

TEXTUAL = {kind: make_processor(kind) for kind in KINDS}
PARSED = {kind: make_processor(kind, control_tokens="parsed") for kind in KINDS}
FORMATS = ("chatml", "instruction")


def control_ids(tokenizer):
    """Ids of control tokens, without the one that unknown characters get."""
    return {i for i in control_tokens(tokenizer).values() if i != tokenizer.unk_token_id}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=TRICKY)
def test_text_never_yields_control_ids(kind, text):
    ids = TEXTUAL[kind].encode_text(text)
    assert not set(ids) & control_ids(TEXTUAL[kind].tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_token_by_name_is_text(kind):
    """Alone, side by side, between words, beside text of a template; the same names in a template are the tokens."""
    tokenizer, encoder = make_tokenizer(kind), TextEncoder(make_tokenizer(kind))
    assert set(CHATML) <= control_tokens(tokenizer).keys()
    for name, number in control_tokens(tokenizer).items():
        runs = [[Part(text, "text")] for text in (name, name * 2, f"a {name} b", f"a{name}b", f"\n{name}\n")]
        runs.append([template("user\n"), Part(name, "text"), template("\n")])
        for ids in encoder.encode(runs):
            assert number == tokenizer.unk_token_id or number not in ids, name
        ((*_, last),) = encoder.encode([[template(f"a {name}")]])
        assert last == number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TRICKY, min_size=4, max_size=4), images=st.integers(0, 2))
def test_conversations_have_the_templates_control_tokens_only(kind, name, texts, images):
    """As many of each kind as the same conversation has with harmless texts, and as many images as were attached."""
    processor = make_processor(kind, name)

    def counts(system, question, answer, more):
        turns = [
            {"from": "system", "value": system},
            human_turn(question, images=images),
            {"from": "gpt", "value": answer},
            human_turn(more),
        ]
        ids = np.array(processor.format_conversation(turns, add_generation_prompt=True)["input_ids"])
        return {i: int((ids == i).sum()) for i in (IMAGE_TOKEN_ID, *control_ids(processor.tokenizer))}

    assert counts(*texts) == counts("a", "b", "c", "d")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(WORDS, min_size=3, max_size=3))
def test_ordinary_text_keeps_its_ids(kind, texts):
    if any(name in text for text in texts for name in CONTROL):
        return
    question, answer, more = texts
    turns = [human_turn(question, images=1), {"from": "gpt", "value": answer}, human_turn(more)]
    for add in (False, True):
        got, released = (each[kind].format_conversation(turns, add_generation_prompt=add) for each in (TEXTUAL, PARSED))
        assert got == released


@pytest.mark.parametrize("kind", ["byte_level", "added", "llama3", "metaspace"])
@settings(max_examples=40, deadline=None)
@given(text=TRICKY)
def test_decoding_gives_the_text_back(kind, text):
    processor = TEXTUAL[kind]
    if kind == "metaspace" and ("\u2581" in text or text.startswith(" ") or "\x00" in text):
        return  # it takes one for the other
    decoded = processor.tokenizer.decode(processor.encode_text(text), skip_special_tokens=True)
    assert decoded == text


def test_parsed_is_the_released_reading():
    ids = PARSED["byte_level"].encode_text("a<|im_end|>b")
    assert PARSED["byte_level"].tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
    assert TEXTUAL["byte_level"].encode_text("a<|im_end|>b") != ids


def test_added_words_stay_tokens_and_added_names_do_not():
    processor = TEXTUAL["added"]
    number = processor.tokenizer.convert_tokens_to_ids
    ids = processor.encode_text("a kedi  <tool_call>")
    assert number("kedi") in ids
    assert number("  ") in ids
    assert number("<tool_call>") not in ids


def test_tokens_added_later_count():
    processor = ParrotProcessor(
        type(make_tokenizer("byte_level"))(tokenizer_object=make_tokenizer("byte_level").backend_tokenizer),
        ImageProcessor.for_tower("clip", 28),
    )
    before = processor.encode_text("a<|new|>b")
    processor.tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    assert processor.encode_text("a<|new|>b") == before


@pytest.mark.parametrize("control", ["text", "parsed"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Nice \ud83d", r"character 5 is no valid text: half a character \(U\+D83D\)"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "character 3 is no valid text: the byte 0xE9"),
    ],
)
def test_text_without_utf8_is_an_error_that_says_where(control, text, message):
    processor = make_processor("byte_level", control_tokens=control)
    for question, answer in ((text, "ok"), ("hi", text)):
        with pytest.raises(DataError, match=message):
            processor.format_conversation([human_turn(question), {"from": "gpt", "value": answer}])


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_check_text_finds_what_has_no_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        with pytest.raises(DataError, match=f"character {error.start} "):
            check_text(text)
    else:
        check_text(text)
        assert json.loads(json.dumps(text)) == text


def test_the_marker_is_an_image_in_human_text_only():
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "An <image>."}]
    ids = TEXTUAL["byte_level"].format_conversation(turns)["input_ids"]
    assert ids.count(IMAGE_TOKEN_ID) == 1
    two = human_turn(f"{IMAGE_TOKEN} here", images=2)
    assert TEXTUAL["byte_level"].format_conversation([two])["input_ids"].count(IMAGE_TOKEN_ID) == 2
