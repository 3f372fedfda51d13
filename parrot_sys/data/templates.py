"""ChatML: from turns to text, turn by turn, with the image marker where the released Parrot code puts it.

Sources: AIDC-AI/Parrot, parrot/model/conversation_formatter.py (format) and parrot/train/data.py (place of the marker).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parrot_sys.data.constants import DEFAULT_SYSTEM_PROMPT, IM_END, IM_START, IMAGE_TOKEN
from parrot_sys.errors import DataError

ROLE_NAMES: Mapping[str, str] = {"system": "system", "human": "user", "gpt": "assistant"}
"""`from` of a turn in a record -> role in ChatML."""
ANSWER_HEADER = f"{IM_START}assistant\n"
TEMPLATE_NAME = "parrot-chatml-1"
"""Changes whenever the text of a conversation changes: caches of token counts depend on it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Text of one turn: header, message, end and the newline that leads to the next turn."""

    text: str
    bears_loss: bool
    """True for answers; their header bears none."""


def move_image_markers(text: str) -> str:
    """Puts every image marker of a turn at its start, each followed by a newline.

    With one marker this is the released rule. The released code keeps one of several; here each image keeps its own.
    """
    count = text.count(IMAGE_TOKEN)
    if not count:
        return text
    return (f"{IMAGE_TOKEN}\n" * count + text.replace(IMAGE_TOKEN, "").strip()).strip()


def render_conversation(turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> list[Segment]:
    """The segments whose texts, joined, are the prompt.

    Args:
        turns: `{"from": "system" | "human" | "gpt", "value": text}`; a system turn is put first when there is none.
        add_generation_prompt: open an answer at the end and leave it open.

    Raises:
        DataError: no turns, or an unknown `from`.
    """
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise DataError(f'turn {index} must be {{"from": ..., "value": text}}, got {turn!r}')
    messages = [(turn["from"], move_image_markers(turn["value"])) for turn in turns]
    if not messages:
        raise DataError("a conversation must have at least one turn, got none")
    if messages[0][0] != "system":
        messages.insert(0, ("system", DEFAULT_SYSTEM_PROMPT))
    if unknown := next((name for name, _ in messages if name not in ROLE_NAMES), None):
        raise DataError(f"`from` of a turn must be one of {', '.join(ROLE_NAMES)}, got {unknown!r}")
    segments = [
        Segment(f"{IM_START}{ROLE_NAMES[name]}\n{message}{IM_END}\n", bears_loss=name == "gpt")
        for name, message in messages
    ]
    if add_generation_prompt:
        return [*segments, Segment(ANSWER_HEADER, bears_loss=True)]
    last = segments[-1]
    return [*segments[:-1], Segment(last.text.removesuffix("\n"), last.bears_loss)]
