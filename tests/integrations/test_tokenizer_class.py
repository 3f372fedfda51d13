"""AutoTokenizer reads the data set builder's tokenizer by the model's type: it must split text as the file does."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from parrot_sys.data.corpora.default.train_tokenizer import train_tokenizer
from parrot_sys.data.tokenizer_files import load_tokenizer

TEXTS = [
    "It's 12:30, they'll see 1234 cats!\n\n",
    "水果 123 和蔬菜",
    "фрукты  и  овощи",
    "فواكه وخضروات ١٢٣",
    "don't\r\n",
]
KINDS = ("", "qwen2", "parrot_qwen2")


@functools.cache
def trained(kind: str) -> Path:
    """A tokenizer's folder, beside a config.json of that model_type."""
    folder = Path(tempfile.mkdtemp())
    train_tokenizer(TEXTS * 5, 400, folder)
    if kind:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.text(alphabet="ab '1٣²\n\r\t .,-é水яب'", max_size=20) | st.sampled_from(TEXTS) | st.text(max_size=10))
def test_ids_are_those_of_the_file(kind: str, text: str) -> None:
    folder = trained(kind)
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids == expected
    assert load_tokenizer(folder)(text, add_special_tokens=False).input_ids == expected


def test_each_digit_is_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained("qwen2"))
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4
