"""The Jinja templates give the text, and the ids, of the formats they are written after."""

from __future__ import annotations

import copy
import functools
from typing import Any, get_args

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot_sys.data.chat_templates import chat_template
from parrot_sys.data.constants import IMAGE_TOKEN, IMAGE_TOKEN_ID
from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.messages import turns_of
from parrot_sys.data.parts import ImagePosition
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.templates import TEMPLATES
from parrot_sys.errors import DataError
from tests.data.tokenizers_of_all_kinds import make_tokenizer

TOKENIZERS = {"chatml": "byte_level", "llama3": "llama3", "instruction": "llama", "vicuna": "llama"}
TEXTS = st.text(alphabet="ab 1\n\t.'é水", max_size=8)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}) | st.just({"type": "image"}), max_size=5)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], bool]:
    """Messages of user and assistant in turn, and whether an answer is to be opened after them."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    count = draw(st.integers(1, 4))
    for index in range(count):
        role = "assistant" if index % 2 else "user"
        content = draw(TEXTS) if index % 2 else draw(TEXTS | PARTS)
        messages.append({"role": role, "content": content})
    return messages, bool(count % 2) and draw(st.booleans())


@functools.cache
def _processor(name: str, position: ImagePosition) -> ParrotProcessor:
    images = ImageProcessor.for_tower("clip", 28)
    tokenizer = copy.deepcopy(make_tokenizer(TOKENIZERS[name]))
    if name == "llama3":
        tokenizer.bos_token = "<|begin_of_text|>"
    return ParrotProcessor(tokenizer, images, TEMPLATES[name], image_position=position)


@pytest.mark.parametrize("position", get_args(ImagePosition))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=40)
@given(conversation=conversations())
def test_text_and_ids_are_those_of_the_format(
    name: str, position: ImagePosition, conversation: tuple[list[dict[str, Any]], bool]
) -> None:
    messages, opened = conversation
    processor = _processor(name, position)
    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(TEMPLATES[name], position),
        add_generation_prompt=opened,
        tokenize=False,
    )
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token
    segments = processor.render(turns_of(messages), add_generation_prompt=opened)
    assert text == "".join(begin * own.begins + own.text + end * own.ends for own in segments)
    if TOKENIZERS[name] != "llama":  # (its metaspace is put before every text again that is encoded by itself)
        ids = [tokenizer.encode(run, add_special_tokens=False) for run in text.split(IMAGE_TOKEN)]
        joined = [token for run in ids for token in (*run, IMAGE_TOKEN_ID)][:-1]
        ours = processor.format_conversation(turns_of(messages), add_generation_prompt=opened)
        assert joined == ours["input_ids"]


@pytest.mark.parametrize(
    ("name", "roles", "opened"),
    [
        ("vicuna", ["assistant"], False),
        ("instruction", ["user", "user"], False),
        ("vicuna", ["system"], False),
        ("instruction", ["user", "assistant"], True),
    ],
)
def test_what_the_format_refuses_the_template_refuses(name: str, roles: list[str], opened: bool) -> None:
    processor = _processor(name, "front")
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(DataError):
        processor.format_conversation(turns_of(messages), add_generation_prompt=opened)
    with pytest.raises(jinja2.TemplateError):
        processor.tokenizer.apply_chat_template(
            messages, chat_template=chat_template(TEMPLATES[name]), add_generation_prompt=opened, tokenize=False
        )


def test_a_saved_tokenizer_has_the_template(tmp_path: Any) -> None:
    processor = _processor("vicuna", "in_place")
    processor.save_pretrained(tmp_path)
    again = ParrotProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.chat_template == chat_template(TEMPLATES["vicuna"], "in_place")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "a"},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": None},
        {"role": "user"},
    ],
)
def test_what_is_no_message_is_named(message: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"role|content|must hold"):
        turns_of([message])
