"""Texts that look like control tokens, and processors with tokenizers of all kinds that read them."""

from __future__ import annotations

from hypothesis import strategies as st

from parrot_sys.data.images import ImageProcessor
from parrot_sys.data.processor import ParrotProcessor
from parrot_sys.data.templates import TEMPLATES
from tests.data.tokenizers_of_all_kinds import CHATML, LLAMA3, make_tokenizer

CONTROL = [*CHATML, *LLAMA3, "<s>", "</s>", "<unk>", "<image>", "<0x0A>", "[SEP]", "[INST]", "<tool_call>", "say:"]
WORDS = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
"""Any text; with next to no chance of a control token in it."""
TRICKY = st.lists(st.one_of(WORDS, st.sampled_from([*CONTROL, " ", "\n", "<", "|>", "\u2581"])), max_size=6).map(
    "".join
)
"""Text with control strings in it, whole, cut and side by side."""


def make_processor(kind, template_name="chatml", **options):
    return ParrotProcessor(
        make_tokenizer(kind), ImageProcessor.for_tower("clip", 28), TEMPLATES[template_name], **options
    )
