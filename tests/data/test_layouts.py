"""Other people's layouts are read as they are: the same conversation in any of them is the same record."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.data.parts import join, moves_images, turn_parts
from parrot_sys.data.records import parse_record
from parrot_sys.data.templates import render_conversation
from parrot_sys.errors import DataError

PATH = Path("set.json")
TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=12).filter(lambda text: IMAGE_TOKEN not in text)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))
QUESTION = st.lists(st.one_of(TEXT, st.none()), min_size=1, max_size=5)
"""Texts, and None for an image."""


def named(question, names):
    """(text or file name of an image) of each part."""
    return [("image", next(names)) if part is None else ("text", part) for part in question]


def marked(parts):
    return "".join(IMAGE_TOKEN if kind == "image" else value for kind, value in parts)


def layouts(conversation):
    """The same conversation, [(parts of the question, answer), ...], as different people write it."""
    images = [value for parts, _ in conversation for kind, value in parts if kind == "image"]

    def turns(roles, keys, content):
        return [
            dict(zip(keys, pair, strict=True))
            for parts, answer in conversation
            for pair in ((roles[0], content(parts)), (roles[1], answer))
        ]

    def paths(parts):
        return [
            {"type": "image", "image": value, "text": None} if kind == "image" else {"type": "text", "text": value}
            for kind, value in parts
        ]

    def urls(parts):
        return [
            {"type": "image_url", "image_url": {"url": value}} if kind == "image" else {"type": "text", "text": value}
            for kind, value in parts
        ]

    def bare(parts):
        return [{"type": "image"} if kind == "image" else {"type": "text", "text": value} for kind, value in parts]

    def keyed(parts):
        return [{"image": value} if kind == "image" else {"text": value} for kind, value in parts]

    llava, openai = (("human", "gpt"), ("from", "value")), (("user", "assistant"), ("role", "content"))
    pairs = [{"user": marked(parts), "assistant": answer, "source": "x"} for parts, answer in conversation]
    yield {"image": images, "conversations": turns(*llava, marked)}
    yield {"images": images, "id": None, "lang": None, "image": None, "messages": turns(*openai, marked)}
    yield {"images": [{"path": name, "bytes": None} for name in images], "conversations": turns(*openai, marked)}
    yield {"images": images, "conversations": turns(openai[0], llava[1], marked)}
    yield {"images": images, "texts": pairs}
    yield {"images": images, "messages": turns(*openai, bare), "conversations": None}
    yield {"images": None, "system": None, "messages": turns(*openai, paths)}
    yield {"messages": turns(*openai, urls)}
    yield {"conversations": turns(*llava, keyed)}
    if len(images) == 1:
        yield {"image": images[0], "conversations": turns(*llava, marked)}


@settings(max_examples=60, deadline=None)
@given(
    questions=st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=3),
    position=st.sampled_from(["front", "in_place"]),
)
def test_every_layout_is_the_same_record(questions, position):
    names = (f"{number}.png" for number in range(100))
    conversation = [(named(question, names), answer) for question, answer in questions]
    first, *others = (parse_record(raw, 0, PATH) for raw in layouts(conversation))
    assert first.images == tuple(value for parts, _ in conversation for kind, value in parts if kind == "image")
    assert [turn["from"] for turn in first.turns] == ["human", "gpt"] * len(conversation)
    for other in others:
        assert other.images == first.images
        assert render_conversation(other.turns, image_position=position) == render_conversation(
            first.turns, image_position=position
        )


@settings(max_examples=60, deadline=None)
@given(question=QUESTION, answer=ANSWER)
def test_images_of_a_content_stay_where_they_are(question, answer):
    """Up to white space at the ends, and to the newline behind images that no word precedes."""
    parts = named(question, iter("abcdefghij"))
    content = [{"type": "image", "image": v} if kind == "image" else {"type": "text", "text": v} for kind, v in parts]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    (human, _) = parse_record({"messages": turns}, 0, PATH).turns
    shown = join(turn_parts(human, "in_place"))
    if None not in question:
        assert shown == "".join(question)
    else:
        assert "".join(shown.split()) == "".join(marked(parts).split())
    front = join(turn_parts(human, "front"))
    assert front.replace("\n", "").startswith(IMAGE_TOKEN * question.count(None))


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([IMAGE_TOKEN, "word", "\n", " "]), max_size=7), extra=st.sampled_from([None, "x"])
)
def test_a_moved_image_is_one_that_the_positions_have_elsewhere(pieces, extra):
    turn = {"from": "human", "value": "".join(pieces), "input": extra}
    assert moves_images(turn) == (turn_parts(turn, "front") != turn_parts(turn, "in_place"))


MARKER = st.sampled_from([IMAGE_TOKEN, f"{IMAGE_TOKEN}\n", f"\n{IMAGE_TOKEN}\n"])


@settings(max_examples=80, deadline=None)
@given(answer=ANSWER, marker=MARKER, images=st.integers(0, 3), words=ANSWER)
def test_markers_that_stand_for_no_image_are_text(answer, marker, images, words):
    """In answers, in `input`, between words where markers on lines of their own are as many as the images."""
    words = words.replace("\n", " ").replace("\r", " ")
    question = f"{IMAGE_TOKEN}\n" * images + f"What is {IMAGE_TOKEN} in {words}?"
    turns = [
        {"from": "human", "value": question, "input": f"a {marker}"},
        {"from": "gpt", "value": answer + marker},
    ]
    record = parse_record({"image": [f"{i}.png" for i in range(images)], "conversations": turns}, 0, PATH)
    assert record.text_markers == 3
    kinds = [part.kind for segment in render_conversation(record.turns) for part in segment.parts]
    assert kinds.count("image") == images


def chat(*contents, **more):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)], **more}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (chat("Hi", None), r"turn 1 must have strings in `role` and `content`, got"),
        (chat("Hi", [{"type": "image", "image": "a.png"}]), "turn 1: an image must be in a human turn"),
        (chat([{"type": "video", "video": "a"}], "x"), "turn 0: a part of the content must be a text or an image, got"),
        (chat([{"type": "text", "text": None}], "x"), "turn 0: a part of the content must be a text or an image, got"),
        (chat([{"type": "image"}], "x"), "must have one <image> marker for each image, got 1 markers and 0 images"),
        (chat("Hi", "x", images=["a.png"]), ".*got 0 markers and 1 images"),
        (chat("<image>\nHi", "x", images=None), ".*got 1 markers and 0 images"),
        (chat("<image>", "x", images=["https://a/b.png"]), "`images` must be a file name or a data URL, got 'https:"),
        (
            chat([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}], "x"),
            "turn 0: an image must be a file",
        ),
        (chat("<image>", "x", images="a.png", image="b.png"), "`image` and `images` must not both hold images"),
        (chat("Nice \ud83d", "x"), r"turn 0: character 5 is no valid text: half a character \(U\+D83D\)"),
        (chat("a", "x\udce9"), "turn 1: character 1 is no valid text: the byte 0xE9"),
        (chat("a", "x", lang="\ud83d"), "`lang`: character 0 is no valid text"),
        (chat("a", "x", id="\ud83d"), "`id`: character 0 is no valid text"),
        (chat("<image>", "x", image="\ud83d.png"), "`image`: character 0 is no valid text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 0: `role` must be one of .*, got 'tool'"),
    ],
)
def test_what_cannot_be_read_is_named(raw, reason):
    with pytest.raises(DataError, match=rf"^set\.json: record 3.*: {reason}"):
        parse_record(raw, 3, PATH)


def test_a_system_field_is_the_system_turn():
    record = parse_record(chat("Hi", "x", system="Be short."), 0, PATH)
    assert [turn["from"] for turn in record.turns] == ["system", "human", "gpt"]
    own = {"messages": [{"role": "system", "content": "Mine."}, *chat("Hi", "x")["messages"]], "system": "Other."}
    assert [turn["value"] for turn in parse_record(own, 0, PATH).turns] == ["Mine.", "Hi", "x"]
