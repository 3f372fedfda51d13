"""The quick ways of building an index: what they say is what the long ways say."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data import layouts
from parrot_sys.data.constants import IGNORE_ID, IMAGE_TOKEN, IMAGE_TOKEN_ID
from parrot_sys.data.records import content_digest, parse_record
from parrot_sys.data.templates import TEMPLATES
from parrot_sys.data.tokenization import measure_conversations
from parrot_sys.errors import DataError
from tests.data.tokenizers_of_all_kinds import KINDS
from tests.data.tricky_texts import TRICKY, make_processor

PIECES = st.lists(st.one_of(TRICKY, st.none()), min_size=1, max_size=4)
"""Texts, and None for an image."""


def content(pieces):
    return [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=15, deadline=None)
@given(
    dialogues=st.lists(st.lists(st.tuples(PIECES, TRICKY), min_size=1, max_size=3), min_size=1, max_size=3),
    system=st.one_of(st.none(), TRICKY),
    position=st.sampled_from(["front", "in_place"]),
)
def test_measures_are_those_of_the_ids(kind, name, dialogues, system, position):
    processor = make_processor(kind, name).with_text_rules(position, "text")
    first = [] if system is None else [{"from": "system", "value": system}]
    rendered = []
    for dialogue in dialogues:
        turns = [
            turn
            for question, answer in dialogue
            for turn in ({"from": "human", "value": content(question)}, {"from": "gpt", "value": answer})
        ]
        rendered.append(processor.render([*first, *turns]))
    measured = measure_conversations(processor.tokenizer, processor._text_encoder(), rendered)
    for found, (ids, labels) in zip(measured, processor.encode(rendered), strict=True):
        assert found.size == len(ids)
        assert found.images == np.flatnonzero(ids == IMAGE_TOKEN_ID).tolist()
        bears_loss = np.concatenate([[False], labels != IGNORE_ID, [False]])
        assert found.labels == np.flatnonzero(bears_loss[1:] != bears_loss[:-1]).tolist()


ODD = st.sampled_from(["", " ", "a", f"{IMAGE_TOKEN}\nb", IMAGE_TOKEN, "\ud800", "é", None, 3])
TURNS = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "system", "user"]), "value": ODD},
        optional={"input": ODD, "role": st.sampled_from([None, "user"])},
    ),
    max_size=3,
)
DIALOGUES = st.lists(st.tuples(ODD, ODD), max_size=3).map(
    lambda pairs: [
        {"value": text, "from": role} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    turns=st.one_of(DIALOGUES, TURNS),
    images=st.one_of(st.none(), st.lists(st.sampled_from(["x.png", "y.png"]), max_size=2)),
    others=st.fixed_dictionaries({}, optional={"system": ODD, "messages": TURNS, "texts": TURNS}),
)
def test_records_in_the_usual_layout_are_read_as_all_others_are(turns, images, others):
    raw = {"conversations": turns, "image": images, **others}

    def outcome():
        try:
            record = parse_record(raw, 0, Path("set.json"))
            return record, content_digest(record)
        except DataError as error:
            return str(error)

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_plain_turns", lambda *_: None)
        assert outcome() == quick


def test_the_quick_way_is_taken_for_the_usual_layout():
    roles = itertools.cycle(("human", "gpt"))
    texts = (f"{IMAGE_TOKEN}\nwhat?", "a cat", "and é?", "猫")
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    assert layouts._plain_turns({"conversations": turns}, 1) == turns
    assert layouts._plain_turns({"conversations": turns}, 2) is None
