"""Conversations as other programs write them: messages with `role` and `content` -> turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parrot_sys.data.parts import Turn
from parrot_sys.data.templates import ROLE_NAMES
from parrot_sys.errors import DataError

_FROM = {role: name for name, role in ROLE_NAMES.items()}


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns of a conversation in the format of transformers; `<image>` in a text is text.

    Args:
        messages: `role` (system, user or assistant) and `content`, a text or a list of parts of type text and image.

    Raises:
        DataError: another role or part, or an image in a message that is not the user's.
    """
    return [_turn(index, message) for index, message in enumerate(messages)]


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images of a conversation in their order: what the parts have under `image`, `url`, `path` or `base64`.

    Raises:
        DataError: a part of type image has none of them.
    """
    found = []
    for part in (part for message in messages for part in _parts(message) if part.get("type") == "image"):
        held = [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if len(held) != 1:
            raise DataError(f"a part of type image needs one of image, url, path and base64, got {sorted(part)}")
        found += held
    return found


def _turn(index: int, message: Mapping[str, Any]) -> Turn:
    role, parts = message.get("role"), _parts(message)
    if role not in _FROM:
        raise DataError(f"role of message {index} must be one of {', '.join(_FROM)}, got {role!r}")
    kinds = {"text", "image"} if role == "user" else {"text"}
    for part in parts:
        if part.get("type") not in kinds:
            raise DataError(
                f"message {index} of {role} must hold parts of type {' or '.join(sorted(kinds))}, "
                f"got {part.get('type')!r}"
            )
    value = [
        {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part.get("text")} for part in parts
    ]
    return {"from": _FROM[role], "value": value}


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise DataError(f"content of a message must be a text or a list of parts, got {content!r}")
    return content
