"""The conversation formats as Jinja templates, which other programs find in a tokenizer as its `chat_template`.

They give the text that `Template.render` gives, and the begin and end of sequence that the ids get besides it. Messages
are those of transformers: `role` and `content`, a text or a list of `{"type": "text", "text": ...}` and
`{"type": "image"}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parrot_sys.data.constants import DEFAULT_SYSTEM_PROMPT, IMAGE_TOKEN
from parrot_sys.data.parts import ImagePosition
from parrot_sys.data.templates import INSTRUCTION_HEADER, VICUNA_HEADER, Template, TemplateName

_SOURCES: Mapping[TemplateName, tuple[tuple[str, ...], dict[str, str]]] = {
    "chatml": (("turns", "chatml"), {"system_prompt": DEFAULT_SYSTEM_PROMPT}),
    "llama3": (("turns", "llama3"), {"system_prompt": DEFAULT_SYSTEM_PROMPT}),
    "instruction": (("turns", "alternating", "instruction"), {"header": INSTRUCTION_HEADER}),
    "vicuna": (("turns", "alternating", "vicuna"), {"header": VICUNA_HEADER}),
}
"""Name -> files that make it up, and texts that they ask for."""


def chat_template(template: Template, image_position: ImagePosition = "front") -> str:
    """The Jinja source of a format.

    Args:
        template: the format.
        image_position: where the images of a message are put, see `place_images`.
    """
    files, texts = _SOURCES[template.name]
    settings: dict[str, Any] = {"image": IMAGE_TOKEN, "in_place": image_position == "in_place", **texts}
    lines = [f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in settings.items()]
    folder = Path(__file__).parent
    return "".join(lines + [(folder / f"{name}.jinja").read_text(encoding="utf-8") for name in files])
