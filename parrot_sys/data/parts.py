"""Parts of a message: text, text of the template, and images; where the images of a turn are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from parrot_sys.data.constants import IMAGE_TOKEN
from parrot_sys.errors import DataError

ImagePosition = Literal["front", "in_place"]
ControlTokens = Literal["text", "parsed"]
Turn = Mapping[str, Any]
"""`{"from": "system" | "human" | "gpt", "value": text or list of parts}`; a human turn may have `input`: what its text
is about. A list holds `{"type": "text", "text": text}` and `{"type": "image"}`. In a text alone, every `<image>` of a
human turn stands for an image; in a list and in other turns it is text."""


class Part(NamedTuple):
    """A stretch of a conversation."""

    text: str
    kind: Literal["template", "text", "image"]
    """`template`: its control tokens are meant; `text`: somebody wrote it, and it holds none; `image`: an image."""


IMAGE = Part(IMAGE_TOKEN, "image")
Parts = tuple[Part, ...]


def template(text: str) -> Part:
    """Text of a template."""
    return Part(text, "template")


def join(parts: Sequence[Part]) -> str:
    """The parts as a reader sees them."""
    return "".join(part.text for part in parts)


def human_turn(text: str, *, images: int = 0) -> dict[str, Any]:
    """A turn with images in front; nothing in the text stands for an image."""
    if IMAGE_TOKEN not in text:
        return {"from": "human", "value": f"{IMAGE_TOKEN}\n" * images + text}
    return {"from": "human", "value": [*([{"type": "image"}] * images), {"type": "text", "text": text}]}


def split_markers(text: str) -> Parts:
    """A text whose `<image>` are images."""
    if IMAGE_TOKEN not in text:
        return (Part(text, "text"),) if text else ()
    first, *rest = text.split(IMAGE_TOKEN)
    parts = [Part(first, "text")]
    for chunk in rest:
        parts += [IMAGE, Part(chunk, "text")]
    return tuple(part for part in parts if part.text)


def turn_parts(turn: Turn, position: ImagePosition) -> Parts:
    """Parts of a turn, with its images where `position` wants them and its `input` on the next line."""
    value = turn["value"]
    if isinstance(value, str) and value and IMAGE_TOKEN not in value and not turn.get("input"):
        return (Part(value, "text"),)  # (as most turns are)
    parts = _own_parts(turn)
    if turn.get("input"):
        parts = (*parts, Part(f"\n{turn['input']}", "text"))
    return place_images(parts, position)


def _own_parts(turn: Turn) -> Parts:
    """Parts of a turn as it has them, without its `input`."""
    value = turn["value"]
    if not isinstance(value, str):
        return tuple(_entry(entry) for entry in value)
    return split_markers(value) if turn["from"] == "human" else (Part(value, "text"),)


def place_images(parts: Sequence[Part], position: ImagePosition) -> Parts:
    """The parts of one turn with its images at their places; a turn without images stays as it is.

    `front` is the released rule: all images are at the start, each followed by a newline, and the text is stripped.
    (The released code keeps one of several; here each image keeps its own.) `in_place` does so with the images that no
    word stands before, and leaves the others where they are.
    """
    count = sum(part.kind == "image" for part in parts)
    if not count:
        return tuple(parts)
    leading = count if position == "front" else _leading_images(parts)
    rest = [part for part in parts if part.kind != "image"] if position == "front" else list(_after(parts, leading))
    front = [part for _ in range(leading) for part in (IMAGE, Part("\n", "text"))]
    if not (text := strip_parts(rest)):
        return tuple(front[:-1])
    return (*front, *text)


def strip_parts(parts: Sequence[Part]) -> Parts:
    """The parts without white space at both ends, as `str.strip` does it."""
    kept = list(parts)
    while kept and kept[0].kind != "image" and not kept[0].text.strip():
        del kept[0]
    while kept and kept[-1].kind != "image" and not kept[-1].text.strip():
        del kept[-1]
    if kept and kept[0].kind != "image":
        kept[0] = kept[0]._replace(text=kept[0].text.lstrip())
    if kept and kept[-1].kind != "image":
        kept[-1] = kept[-1]._replace(text=kept[-1].text.rstrip())
    return tuple(kept)


def moves_images(turn: Turn) -> bool:
    """Whether `front` puts an image of this turn somewhere else than `in_place` does: one that follows a word."""
    if isinstance(turn["value"], str) and IMAGE_TOKEN not in turn["value"]:
        return False
    parts = _own_parts(turn)
    return sum(part.kind == "image" for part in parts) > _leading_images(parts)


def check_text(text: str) -> None:
    """Whether a text has a UTF-8 form, which tokenizers and files need.

    Raises:
        DataError: it holds half a surrogate pair, or a byte that could not be decoded; says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"half a character (U+{code:04X})"
        raise DataError(f"character {error.start} is no valid text: {what}, which has no UTF-8") from None


def _leading_images(parts: Sequence[Part]) -> int:
    count = 0
    for part in parts:
        if part.kind == "image":
            count += 1
        elif part.text.strip():
            break
    return count


def _after(parts: Sequence[Part], images: int) -> Sequence[Part]:
    """The parts that follow so many images."""
    for index, part in enumerate(parts):
        if not images:
            return parts[index:]
        images -= part.kind == "image"
    return ()


def _entry(entry: Any) -> Part:
    if isinstance(entry, Mapping):
        if entry.get("type") == "image":
            return IMAGE
        if entry.get("type") == "text" and isinstance(entry.get("text"), str):
            return Part(entry["text"], "text")
    raise DataError(f'a part of a turn must be {{"type": "image"}} or {{"type": "text", "text": text}}, got {entry!r}')
